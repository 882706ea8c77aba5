"""Measurements that can be repeated: every candidate beside its baseline, checked, interleaved, in one run."""
