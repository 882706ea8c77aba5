"""Who may write where, and what people read when the Hub says no."""

import errno
from types import SimpleNamespace

import pytest

from fastbert_hf.hub.access import check_write_access, explained


def api(role="fineGrained", **organisations):
    orgs = [{"name": name, "roleInOrg": rights} for name, rights in organisations.items()]
    user = {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role}}}
    return SimpleNamespace(whoami=lambda: user)


@pytest.mark.parametrize(("repo", "full"), [("model", "me/model"), ("me/model", "me/model"), ("lab/m", "lab/m")])
def test_one_s_own_and_one_s_organisations_repositories_are_allowed(repo, full):
    assert check_write_access(api(lab="contributor"), repo) == full


@pytest.mark.parametrize("repo", ["lab/model", "other/model"])
def test_organisations_that_one_only_reads_are_not(repo):
    with pytest.raises(ValueError, match=f"me may not write to {repo}; expected a repository of me, friends"):
        check_write_access(api(lab="read", friends="admin"), repo)


def test_a_read_token_is_refused():
    with pytest.raises(ValueError, match=r"the token \(HF_TOKEN\) of me only reads"):
        check_write_access(api(role="read"), "me/model")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line(number):
    with pytest.raises(ValueError, match="no room on the disk for me/model"), explained("me/model"):
        raise OSError(number, "full")


def test_errors_that_are_not_the_hub_s_stay_what_they_are():
    for error in (OSError(errno.EACCES, "denied"), RuntimeError("ours"), KeyError("ours")):
        with pytest.raises(type(error)), explained("me/model"):
            raise error
