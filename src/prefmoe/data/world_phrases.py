"""What the simulated world can say: for each quality, phrases that show it beside phrases that show its reverse.

`[a|b]` is one of its alternatives, `{thing}` a slot that the prompt fills (see world_text.py). Half of the phrases
differ from their reverse in the order of the words alone ("plans come before feelings"), so that counting words
cannot give all of the levels away.
"""

from typing import NamedTuple


class Cue(NamedTuple):
    """A phrase that shows a quality (`high`) and its counterpart that shows the reverse (`low`)."""

    high: str
    low: str


# The three capabilities of each task: clauses of at most seven words. Words of the topic are plural.
POINTS: dict[str, dict[str, tuple[Cue, ...]]] = {
    "advice": {
        "empathy": (
            Cue("feelings come before plans", "plans come before feelings"),
            Cue("I listen first and judge later", "I judge first and listen later"),
            Cue("[worry|fear] is human, not a failing", "[worry|fear] is a failing, not human"),
            Cue("it makes sense to feel [torn|uneasy]", "it is silly to feel [torn|uneasy]"),
            Cue("I can see why it [hurts|troubles] you", "nobody can see why it [hurts|troubles] you"),
            Cue("this must be [hard|heavy] for you", "this cannot be [hard|heavy] for anyone"),
        ),
        "question_specific": (
            Cue("the {thing} come before general rules", "general rules come before the {thing}"),
            Cue("the {thing} decide, not the theory", "the theory decides, not the {thing}"),
            Cue("it depends on {thing}, hardly on luck", "it depends on luck, hardly on {thing}"),
            Cue("it is different {detail}", "it is the same for everyone"),
            Cue("a look at the {thing} will [help|pay]", "a look at things will [help|pay]"),
            Cue("the {thing} need care {detail}", "most things need care"),
        ),
        "proactivity": (
            Cue("you can start now and rest later", "you can rest now and start later"),
            Cue("it happens today, not someday", "it happens someday, not today"),
            Cue("a [small|first] step beats a wait", "a wait beats a [small|first] step"),
            Cue("I will ask again on [Monday|Friday]", "I leave it at that"),
            Cue("the next step is [a list|a call]", "the next step is unknown"),
            Cue("[ten minutes|small tasks] will get it moving", "it will move by itself"),
        ),
    },
    "facts": {
        "reasoning": (
            Cue("reasons come first and claims second", "claims come first and reasons second"),
            Cue("this is shown, not merely said", "this is merely said, not shown"),
            Cue("the {thing} lead to the conclusion", "the conclusion leads to the {thing}"),
            Cue("this happens because the {thing} change", "this happens, and the {thing} change"),
            Cue("for this reason the {thing} differ", "for no reason the {thing} differ"),
            Cue("if the {thing} fail, the rest fails", "the {thing} simply fail"),
        ),
        "depth": (
            Cue("the answer lies below, not on top", "the answer lies on top, not below"),
            Cue("it is many layers, not one thing", "it is one thing, not many layers"),
            Cue("details count more than outlines", "outlines count more than details"),
            Cue("the {thing} have [three|four] layers", "the {thing} are what they are"),
            Cue("two processes set the [rate|balance]", "something sets the [rate|balance]"),
            Cue("[older|recent] work measures the {thing}", "people know the {thing}"),
        ),
        "objectiveness": (
            Cue("records count more than taste", "taste counts more than records"),
            Cue("both sides are heard, neither is mocked", "both sides are mocked, neither is heard"),
            Cue("I report it and never judge it", "I judge it and never report it"),
            Cue("anyone can [test|check] this", "nobody should [test|check] this"),
            Cue("several sources agree on the {thing}", "the {thing} are simply the best"),
            Cue("it is neither good nor bad", "it is bad, as I feel"),
        ),
    },
    "writing": {
        "intent_conformity": (
            Cue("{element} came first, the {thing} second", "the {thing} came first, {element} second"),
            Cue("they spoke of {element}, hardly of {thing}", "they spoke of {thing}, hardly of {element}"),
            Cue("{element} was the heart, not the frame", "{element} was the frame, not the heart"),
            Cue("{element} changed everything", "{element} was soon forgotten"),
            Cue("nobody could forget {element}", "nobody noticed {element}"),
            Cue("it all turned on {element}", "it all turned on something else"),
        ),
        "expressiveness": (
            Cue("[she|he] showed grief and hid nothing", "[she|he] showed nothing and hid grief"),
            Cue("tears came before words", "words came before tears"),
            Cue("the heart ruled, the head obeyed", "the head ruled, the heart obeyed"),
            Cue("[her|his] hands shook with [joy|dread]", "[her|his] hands lay still"),
            Cue("the cold [bit|stung] like [teeth|salt]", "the cold was noted"),
            Cue("[joy|grief] rose with every [breath|step]", "the day went on as before"),
        ),
        "content_richness": (
            Cue("there were many {thing} and few gaps", "there were few {thing} and many gaps"),
            Cue(
                "[Mara|Otto] counted {thing} and guessed nothing",
                "[Mara|Otto] counted nothing and guessed {thing}",
            ),
            Cue("it was full of {thing}, not air", "it was full of air, not {thing}"),
            Cue("there were {thing}, {thing2} and {thing3}", "there were some things"),
            Cue("[Mara|Otto] traded {thing} for {thing2}", "someone did something"),
            Cue("past the {thing} ran a [lane|stream]", "past the {thing} was more"),
        ),
    },
}

# The first and the last sentence of a completion, at most seven words.
WARM_OPENING = (
    Cue("I see a friend, not a stranger.", "I see a stranger, not a friend."),
    Cue("You come first and I second.", "I come first and you second."),
    Cue("Thank you for asking[|, dear friend].", "Here is the [answer|reply]."),
    Cue("I am so glad you [asked|wrote].", "I see that you [asked|wrote]."),
    Cue("What a [lovely|kind] thing to ask.", "What a thing to ask."),
)
WARM_CLOSING = (
    Cue("I would rather stay than go.", "I would rather go than stay."),
    Cue("This is a welcome, not a farewell.", "This is a farewell, not a welcome."),
    Cue("I wish you [all the best|much joy].", "That is [all|the end]."),
    Cue("Do [come back|write again] soon, dear friend.", "Do not [come back|write again] soon."),
    Cue("It was lovely to [talk|hear this].", "It was [enough|time to stop]."),
)

# Openings of a sentence, at most five words; the reverse is certain.
HEDGES = (
    Cue("less a rule than a guess:", "less a guess than a rule:"),
    Cue("in doubt, not in truth,", "in truth, not in doubt,"),
    Cue("perhaps", "certainly"),
    Cue("it may be that", "it must be that"),
    Cue("I would guess that", "I am sure that"),
    Cue("it seems that", "of course"),
)

# Endings of a sentence, at most five words; the reverse is plain.
ORNAMENTS = (
    Cue("more song than speech", "more speech than song"),
    Cue("silk rather than stone", "stone rather than silk"),
    Cue("like [a lantern|a bell] in [fog|snow]", "in [plain|short] words"),
    Cue("like [rain|moonlight] on [silver|silk]", "as it [is|was]"),
    Cue("as if [stars|winds] were singing", "as [plain|flat] as that"),
    Cue("as [soft|bright] as [a pearl|gold]", "with nothing added"),
)

# Sentences that say nothing, at most seven words: a brief completion has none of them.
FILLERS = (
    "There is [more|much] to say about it.",
    "As was said, it was said before.",
    "It goes on [and on|from there].",
    "Let me [say|put] that once more.",
    "This brings us to [the next|another] part.",
    "And so on, with all the rest.",
)
