"""Where this package comes from, as its own metadata says."""

import re
from importlib import metadata

DISTRIBUTION = "fastbert-hf"
# labels of Project-URL for a repository, as the packaging specifications list them; a home page comes last
LABELS = ("source", "repository", "sourcecode", "github", "homepage")
# no user name or password, and nothing that a shell or Markdown would take for its own
ADDRESS = re.compile(r"https://[A-Za-z0-9.-]+(:[0-9]+)?(/[A-Za-z0-9._~-]+)+")


def repository_address() -> str | None:
    """The https address of the package's repository; None if it is not installed or its metadata names none.

    The name alone would not do: whoever registers it in an index decides what it installs.
    """
    try:
        fields = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    addresses = {"homepage": (fields.get("Home-page") or "").strip()}
    for entry in fields.get_all("Project-URL") or ():
        label, _, address = entry.partition(",")
        addresses[re.sub(r"[^a-z]", "", label.lower())] = address.strip()
    for label in LABELS:
        address = addresses.get(label, "").rstrip("/")
        if ADDRESS.fullmatch(address):
            return address
    return None
