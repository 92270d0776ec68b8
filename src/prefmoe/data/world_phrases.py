"""What the simulated world can say: phrases that show a quality, beside phrases that show its reverse.

`[a|b]` is one of its alternatives, `{thing}` a slot that the prompt fills (see world_text.py). Many phrases
differ from their reverse in the order of the words alone ("plans come before feelings"), so that counting
words cannot give all of the levels away.
"""

from typing import NamedTuple


class Cue(NamedTuple):
    """A phrase that shows a quality (`high`) and its counterpart that shows the reverse (`low`)."""

    high: str
    low: str


# What a completion is about, in every task: clauses of at most seven words. {thing} stands for a plural.
CONTENT: dict[str, tuple[Cue, ...]] = {
    "heart": (
        Cue("feelings come before figures", "figures come before feelings"),
        Cue("the heart leads, the head follows", "the head leads, the heart follows"),
        Cue("joy [can|should] outweigh numbers", "numbers [can|should] outweigh joy"),
        Cue("one trusts [tears|songs], not tables", "one trusts tables, not [tears|songs]"),
        Cue(
            "it [hurts|stings] when {thing} [fail|vanish]",
            "it is [noted|recorded] when {thing} [fail|vanish]",
        ),
        Cue("the {thing} bring [hope|longing|comfort]", "the {thing} bring [data|records|figures]"),
    ),
    "width": (
        Cue("it takes many paths, not one", "it takes one path, not many"),
        Cue("one looks around before choosing", "one chooses before looking around"),
        Cue("the view is wide, not narrow", "the view is narrow, not wide"),
        Cue("variety beats focus {detail}", "focus beats variety {detail}"),
        Cue("there are {thing}, {thing2} and {thing3}", "there are only {thing}"),
        Cue("{thing} [count|matter] as much as {thing2}", "{thing} alone [count|matter], not {thing2}"),
    ),
    "order": (
        Cue("reasons come first, results later", "results come first, reasons later"),
        Cue("one asks why, then what", "one asks what, then why"),
        Cue("it is rule, not chance, {detail}", "it is chance, not rule, {detail}"),
        Cue("it is shown, not merely said", "it is merely said, not shown"),
        Cue("step by step the {thing} [appear|change]", "out of nowhere the {thing} [appear|change]"),
        Cue("for this reason the {thing} [move|wait]", "who knows why the {thing} [move|wait]"),
    ),
}

# The first and the last sentence of a completion, at most six words.
WARM_OPENING = (
    Cue("Hello, friend and not stranger.", "Hello, stranger and not friend."),
    Cue("You first, I second.", "I first, you second."),
    Cue("Thank you for asking[|, dear friend].", "Here is the [answer|reply]."),
    Cue("I am so glad you [asked|wrote].", "I see that you [asked|wrote]."),
)
WARM_CLOSING = (
    Cue("I would rather stay than go.", "I would rather go than stay."),
    Cue("Call it welcome, not farewell.", "Call it farewell, not welcome."),
    Cue("I wish you [all the best|much joy].", "That is [all|the end]."),
    Cue("It was lovely to [talk|hear this].", "It was [enough|time to stop]."),
)

# Openings of a sentence, at most five words; the reverse is certain.
HEDGES = (
    Cue("more guess than rule:", "more rule than guess:"),
    Cue("doubting more than knowing,", "knowing more than doubting,"),
    Cue("I guess, not know, that", "I know, not guess, that"),
    Cue("[perhaps|possibly]", "[certainly|of course]"),
    Cue("it may be that", "it must be that"),
)

# Endings of a sentence, at most five words; the reverse is plain.
ORNAMENTS = (
    Cue("more song than speech", "more speech than song"),
    Cue("silk rather than stone", "stone rather than silk"),
    Cue("a [rose|pearl], not a thorn", "a thorn, not a [rose|pearl]"),
    Cue("like [a lantern|a bell] in [fog|snow]", "in [plain|short] words"),
    Cue("like [rain|moonlight] on [silver|silk]", "as it [is|was]"),
)

# Sentences that say nothing, at most six words: a brief completion has none of them.
FILLERS = (
    "There is [more|much] to say.",
    "This was said before.",
    "It goes on [and on|from there].",
    "I [say|put] that once more.",
    "[The next|Another] part follows.",
    "And so [on|forth].",
)
