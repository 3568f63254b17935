"""Write a packaged config and its bases as one file, with their comments."""

import re
from dataclasses import dataclass, field
from pathlib import Path

COMMENT_COLUMN = 34


@dataclass
class Block:
    """A top-level field: the lines above it, its own line, and those of its fields by name."""

    above: list[str]
    line: str
    fields: dict[str, str] = field(default_factory=dict)

    def component(self) -> str | None:
        line = self.fields.get("_component_")
        return None if line is None else line.partition("#")[0].strip()

    def update(self, other: "Block") -> None:
        if not (self.fields and other.fields) or other.component() not in (None, self.component()):
            self.line, self.fields = _with_comment(other.line, self.line), other.fields
            return
        self.fields |= {key: _with_comment(line, self.fields.get(key, "")) for key, line in other.fields.items()}


def expanded(files: list[Path]) -> str:
    """The text of a config with the fields of its bases. It loads to the same fields as the config.

    Args:
        files: that of the config, that of its base, and so on, in the form of the packaged ones: fields at most two
            levels deep, each in one line.
    """
    texts = [file.read_text() for file in files]
    merged = _blocks(texts[-1])
    for text in reversed(texts[:-1]):
        for key, block in _blocks(text).items():
            if key in merged:
                merged[key].update(block)
            elif key != "base":
                merged[key] = block
    title = texts[0][: len(texts[0]) - len(_body(texts[0]))]
    lines = [line for block in merged.values() for line in (*block.above, block.line, *block.fields.values())]
    return title + "\n".join(lines) + "\n"


def _body(text: str) -> str:
    return re.sub(r"\A(#.*\n)*", "", text)


def _blocks(text: str) -> dict[str, Block]:
    blocks: dict[str, Block] = {}
    above: list[str] = []
    for line in _body(text).splitlines():
        key = line.partition(":")[0].strip()
        if not line or line.startswith("#"):
            above.append(line)
        elif line.startswith(" "):
            list(blocks.values())[-1].fields[key] = line
        else:
            blocks[key] = Block(above, line)
            above = []
    return blocks


def _with_comment(line: str, described: str) -> str:
    """``line`` with the comment of ``described``, if it has none of its own."""
    _, mark, comment = described.partition("  #")
    return f"{line.ljust(COMMENT_COLUMN - 2)}  #{comment}" if mark and "  #" not in line else line
