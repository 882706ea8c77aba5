"""Push a model folder to the Hub: weights, configuration, code, tokenizer and model card in one commit.

    fastbert push runs/mrpc you/fastbert-mrpc --private --dry_run

The token is that of HF_TOKEN or of `hf auth login`. What has not changed is not sent again. The pushed revision is
then loaded back, and its checksums and outputs compared.
"""

from pathlib import Path

from fastbert_hf.cli.arguments import CommandParser
from fastbert_hf.hub.push import Pushed, PushOptions, endpoint, file_lines, push, stage_upload


def main(argv: list[str] | None = None) -> Pushed | None:
    """Parse, push or list, report."""
    parser = CommandParser(prog="fastbert push", description=__doc__)
    parser.add_argument("folder", help="model folder, of FastBERT or of the published layout")
    parser.add_argument("repo", help="NAMESPACE/NAME on the Hub, or NAME in your own namespace")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to, made if needed; default: main")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request in place of a commit")
    parser.add_argument("--commit_message", default=PushOptions.commit_message)
    parser.add_argument(
        "--license", help="the Hub's name of the licence, e.g. mit; otherwise the folder's README.md's"
    )
    parser.add_argument("--benchmark", type=Path, help="results.json of `fastbert benchmark`, for the card")
    parser.add_argument("--max_shard_size", default=PushOptions.max_shard_size, help="larger weights are split")
    parser.add_argument("--dry_run", action="store_true", help="list what would be sent; nothing is")
    settings = vars(parser.parse_args(argv))
    folder, repo, dry_run = (settings.pop(name) for name in ("folder", "repo", "dry_run"))
    options = PushOptions(**settings)
    if dry_run:
        with stage_upload(Path(folder), repo, options) as would_be:
            print(f"would be sent to {repo} on {endpoint()}:")
            print("\n".join(f"  {line}" for line in file_lines(would_be.sizes())))
        return None
    pushed = push(folder, repo, options)
    print(f"{pushed.repo} at {pushed.commit}{'' if pushed.changed else ': nothing had changed, no commit made'}")
    print("\n".join(f"  {line}" for line in file_lines(pushed.sizes)))
    print(f"loaded back: checksums equal, outputs differ by {pushed.difference:g}")
    print(pushed.url)
    return pushed
