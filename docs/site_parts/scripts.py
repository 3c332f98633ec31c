"""The scripts of examples/ as sphinx-gallery wants them, and how each is run small while the pages are built."""

import re
import shutil
import textwrap
from pathlib import Path

# What to pass on the command line. A script that is not named here needs data or a pipeline, and is not run.
ARGUMENTS = {
    "compare_samplers": "--calls 5 10 20 --many 64",
    "guide_your_model": "--steps 60",
    "train_on_your_folder": "--steps 300 --size 16 --network tiny --model ../models/discs",
    "your_own_process": "--steps 300 --model ../models/sub-vp",
    "your_own_solver": "",
    "your_pipeline": "",
}


def as_cells(text: str) -> str:
    """Give a script the headings of reStructuredText: its first sentence, and the titles of its cells."""
    head, code = re.match(r'"""(.*?)"""\n(.*)', text, re.DOTALL).groups()
    first, _, more = head.partition("\n")
    title, _, what = first.rstrip(".").partition(": ")
    what = f"{what[:1].upper()}{what[1:]}.\n" if what else ""
    more = re.sub(r"\n\n((?: {4}.*\n)+)", lambda found: f"\n\n.. code-block:: sh\n\n{found[1]}", f"\n{what}\n{more}")
    code = code if "# %%" in code else f"# %%\n{code}"
    code = re.sub(
        r"^# %% (.+)$", lambda found: f"# %%\n# {found[1]}\n# {'-' * len(found[1])}", code, flags=re.MULTILINE
    )
    return f'"""{title}\n{"=" * len(title)}\n{more}"""\n{code}'


def write_scripts(source: Path, target: Path) -> None:
    """Write the scripts of `source`, with a page of contents, to `target`; files that would not change are left."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target.with_name("models"), ignore_errors=True)  # trained by scripts that ran before
    header = """\
        Examples
        ========

        Scripts to copy from. Those with a picture were run, small, while this page was built. ``--help`` lists the
        arguments of each.
        """
    written = {"GALLERY_HEADER.rst": textwrap.dedent(header)}
    written |= {path.name: as_cells(path.read_text(encoding="utf-8")) for path in sorted(source.glob("*.py"))}
    for name, text in written.items():
        path = target / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def arguments(gallery_conf: dict, script_vars: dict) -> list[str]:
    """What the script is called with."""
    return ARGUMENTS[Path(script_vars["src_file"]).stem].split()


class Pictures:
    """What a script wrote while it ran, as sphinx-gallery's scraper of images."""

    def __repr__(self) -> str:
        return "Pictures"

    def __call__(self, block: object, block_vars: dict, gallery_conf: dict) -> str:
        from sphinx_gallery.scrapers import figure_rst

        folder = Path(block_vars["src_file"]).parent
        targets = []
        for path in sorted(folder.glob("*.png"), key=lambda file: file.stat().st_mtime):
            target = Path(next(block_vars["image_path_iterator"]))
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
            targets.append(str(target))
        return figure_rst(targets, gallery_conf["src_dir"])
