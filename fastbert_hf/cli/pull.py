"""Take a FastBERT or crammedBERT model from the Hub: pinned to a commit, every checksum verified, nothing executed.

    fastbert pull pbelcak/UltraFastBERT-1x11-long runs/ultrafastbert --convert

The token, where one is needed, is that of HF_TOKEN or of `hf auth login`. Without a connection the cache answers.
"""

from fastbert_hf.cli.arguments import CommandParser
from fastbert_hf.hub.pull import Pulled, pull


def main(argv: list[str] | None = None) -> Pulled:
    """Parse, pull, report."""
    parser = CommandParser(prog="fastbert pull", description=__doc__)
    parser.add_argument("repo", help="NAMESPACE/NAME on the Hub")
    parser.add_argument("folder", nargs="?", help="where the files go; without it they stay in the client's cache")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument(
        "--convert", action="store_true", help="write the native layout, and report what became of it"
    )
    options = parser.parse_args(argv)
    pulled = pull(options.repo, options.folder, options.revision, options.convert)
    source = "the cache, offline" if pulled.from_cache else "the Hub"
    verified = "checksums verified"
    if pulled.unverified:
        # on Windows without its developer mode, for one
        verified = f"{pulled.unverified} of them not verified: a cache without symbolic links keeps no checksums"
    print(f"{pulled.repo} at {pulled.commit}, from {source}: {pulled.files} files, {verified}")
    for line in pulled.conversion.lines() if pulled.conversion else ():
        print(f"  {line}")
    print(f"in {pulled.folder}")
    return pulled
