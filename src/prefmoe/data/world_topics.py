"""What the prompts of the simulated world are about; every task can be asked about every topic."""

from typing import NamedTuple


class Topic(NamedTuple):
    """A subject: its name, what one does with it, and five of its things (plural nouns)."""

    noun: str
    doing: str
    things: tuple[str, ...]


def _topic(noun: str, doing: str, things: str) -> Topic:
    return Topic(noun, doing, tuple(things.split()))


TOPICS = (
    _topic("gardens", "keep a garden", "seeds hedges spades beetles roots"),
    _topic("bread", "bake bread", "loaves ovens crusts grains bakers"),
    _topic("the sea", "swim in the sea", "waves tides shells gulls currents"),
    _topic("winter", "get through the winter", "icicles stoves scarves drifts sleds"),
    _topic("coffee", "make good coffee", "beans cups roasters filters mugs"),
    _topic("bicycles", "mend a bicycle", "wheels chains pedals spokes brakes"),
    _topic("the moon", "photograph the moon", "craters shadows lenses phases telescopes"),
    _topic("bees", "keep bees", "hives swarms combs drones blossoms"),
    _topic("chess", "learn chess", "pawns openings knights boards rooks"),
    _topic("rivers", "fish in a river", "banks eels bridges rapids reeds"),
    _topic("trains", "travel by train", "rails tickets carriages signals stations"),
    _topic("violins", "play the violin", "strings bows scales pegs tunes"),
    _topic("markets", "sell at a market", "stalls crates scales traders coins"),
    _topic("mountains", "climb a mountain", "ridges boots ropes peaks paths"),
    _topic("clocks", "repair a clock", "gears springs hands dials bells"),
    _topic("horses", "ride a horse", "hooves saddles stables reins fields"),
    _topic("letters", "write a letter", "stamps envelopes pages pens couriers"),
    _topic("rain", "plan for rain", "clouds gutters puddles roofs umbrellas"),
    _topic("candles", "make candles", "wicks flames molds jars shadows"),
    _topic("maps", "read a map", "borders contours compasses legends roads"),
    _topic("kites", "fly a kite", "strings tails frames gusts knots"),
    _topic("libraries", "run a library", "shelves readers catalogs ladders lamps"),
    _topic("orchards", "plant an orchard", "apples ladders baskets branches blossoms"),
    _topic("lighthouses", "paint a lighthouse", "lamps stairs rocks keepers storms"),
    _topic("soup", "cook soup", "carrots pots spoons onions bowls"),
    _topic("pottery", "throw a pot", "kilns glazes wheels bowls handles"),
    _topic("owls", "watch owls", "feathers wings barns mice nests"),
    _topic("forests", "walk in a forest", "oaks ferns trails deer mushrooms"),
    _topic("ships", "build a model ship", "sails masts planks hulls anchors"),
    _topic("festivals", "host a festival", "drums tents lanterns crowds dancers"),
    _topic("wool", "knit with wool", "needles sheep sweaters dyes looms"),
    _topic("glass", "blow glass", "furnaces bottles pipes windows beads"),
    _topic("volcanoes", "visit a volcano", "vents ashes slopes craters cinders"),
    _topic("theaters", "act in a theater", "curtains actors masks stages scripts"),
    _topic("bridges", "sketch a bridge", "arches cables piers beams towers"),
    _topic("cheese", "make cheese", "goats rinds cellars molds wheels"),
)

# The circumstances of a prompt.
DETAILS = (
    "in winter",
    "in the rain",
    "at night",
    "by the sea",
    "in old age",
    "in town",
    "with children",
    "without money",
)

# How each task asks.
FRAMES: dict[str, tuple[str, ...]] = {
    "advice": (
        "How can I {doing} {detail}?",
        "I would like to {doing} {detail}. What should I do?",
        "I am trying to {doing} {detail}. Any advice?",
        "My plan is to {doing}, but it is hard {detail}. Can you help me?",
        "What would you tell someone who wants to {doing} {detail}?",
        "I keep failing to {doing}. What can I try {detail}?",
        "Should I {doing} {detail}, or leave it?",
        "I am nervous: I have to {doing} {detail}. Where do I start?",
    ),
    "facts": (
        "What is known about {noun} {detail}?",
        "Explain {noun} {detail} to me.",
        "Tell me the facts about {noun} {detail}.",
        "How do {things} work {detail}, and what have they to do with {noun}?",
        "I need some information on {noun} {detail}.",
        "Describe what {noun} and {things} have in common {detail}.",
        "What do {things} tell us about {noun} {detail}?",
        "Why do people study {noun} {detail}?",
    ),
    "writing": (
        "Write a short scene about {noun} {detail}.",
        "Write a few lines on {noun}. They must play {detail}.",
        "Tell me a tiny story about {noun} {detail}.",
        "Compose a small piece about {noun} and {things} {detail}.",
        "Can you write the start of a novel about {noun} {detail}?",
        "A very short tale, if you can: {noun} and {things} {detail}.",
        "Invent someone who wants to {doing} {detail}.",
        "Write a paragraph of fiction on {noun} {detail}.",
    ),
}
