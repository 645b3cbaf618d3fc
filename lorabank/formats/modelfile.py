"""Ollama's Modelfile, with the chat template put into Go's template language where that can be said.

A Jinja template can compute anything; most only write something before and after each turn. So a template is asked to render
turns that can be told apart, what it wrote around them is taken, and that is kept only if it renders other chats the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Turns = list[dict[str, str]]
Render = Callable[[Turns, bool], str | None]
"""Turns and whether the answer is to begin → the text of the template; None where it refuses such turns."""

SYSTEM, USER, ANSWER, NEXT = "7system7", "7user7", "7answer7", "7next7"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class TurnTemplate:
    """A chat template that writes something before and after each turn."""

    around: Mapping[str, tuple[str, str]]
    """Role → (before, after)."""
    begin: str
    """What the answer begins after."""
    default_system: str | None
    """The system turn that the template adds where there is none."""

    def render(self, turns: Turns) -> str:
        """The text of turns whose answer is to begin, as ollama would make it."""
        if self.default_system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.default_system}, *turns]
        return "".join(turn["content"].join(self.around[turn["role"]]) for turn in turns) + self.begin

    def in_go(self) -> str:
        """The same in Go's template language."""
        branches = [
            f'{{{{ {"else if" if i else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for i, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{{{{- range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{self.begin}"


def read_template(render: Render, *, bos: str | None = None) -> TurnTemplate | None:
    """What a chat template writes around turns; None where it does more than that.

    `bos`: a token that the tokenizer puts before every text; it is left out where the template writes it too.
    """

    def text(*turns: tuple[str, str], begin: bool = False) -> str | None:
        found = render([{"role": role, "content": content} for role, content in turns], begin)
        return found.removeprefix(bos) if found and bos else found

    system, user, answer = ("system", SYSTEM), ("user", USER), ("assistant", ANSWER)
    asked, begun = text(system, user), text(system, user, begin=True)
    ended, going_on, plain = text(system, user, answer), text(system, user, answer, ("user", NEXT)), text(user)
    if asked is None or begun is None or ended is None or going_on is None or plain is None or not begun.startswith(asked):
        return None
    try:
        (before_system, rest), (_, after_answer) = asked.split(SYSTEM), ended.split(ANSWER)
        between, after_user = rest.split(USER)
        _, rest = going_on.split(USER)
        to_answer, rest = rest.split(ANSWER)
        to_next, _ = rest.split(NEXT)
        before_plain, _ = plain.split(USER)
    except ValueError:  # a turn is missing or doubled
        return None
    before_user, before_answer = to_next.removeprefix(after_answer), to_answer.removeprefix(after_user)
    after_system = between.removesuffix(before_user)
    default = None
    if before_plain != before_user:
        default = before_plain.removeprefix(before_system).removesuffix(after_system + before_user)
    found = TurnTemplate(
        around={
            "system": (before_system, after_system),
            "user": (before_user, after_user),
            "assistant": (before_answer, after_answer),
        },
        begin=begun.removeprefix(asked),
        default_system=default,
    )
    return found if _renders_alike(found, text) and _can_be_written(found) else None


def _renders_alike(found: TurnTemplate, text: Callable[..., str | None]) -> bool:
    chats: Sequence[Sequence[tuple[str, str]]] = (
        (("user", "a b"),),
        (("user", "one"), ("assistant", "two"), ("user", "three")),
        (("system", "be brief"), ("user", "one\ntwo")),
        (("system", "x"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
    )
    return all(
        found.render([{"role": role, "content": content} for role, content in chat]) == text(*chat, begin=True) for chat in chats
    )


def _can_be_written(found: TurnTemplate) -> bool:
    parts = [*(part for pair in found.around.values() for part in pair), found.begin, found.default_system or ""]
    return not any(mark in part for part in parts for mark in ("{{", "}}", '"""'))


def modelfile(
    base: str, *, adapter: str | None = None, template: TurnTemplate | None = None, stop: Sequence[str] = (), note: str = ""
) -> str:
    """The text of a Modelfile. `base`: a file, a folder or ollama's name; `adapter`: a file; `note`: a comment at the top."""
    lines = [f"# {line}" for line in note.splitlines()]
    lines.append(f"FROM {base}")
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if template is not None:
        lines.append(f'TEMPLATE """{template.in_go()}"""')
        if template.default_system:
            lines.append(f'SYSTEM """{template.default_system}"""')
    lines += [f'PARAMETER stop "{word}"' for word in dict.fromkeys(stop) if '"' not in word]
    return "\n".join(lines) + "\n"
