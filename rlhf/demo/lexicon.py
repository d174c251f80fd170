"""The words of the built-in world: neutral ones, and opinions with the sentiment they carry."""


def _listed(words: str) -> list[str]:
    return words.split("|")


GENRES = _listed(
    "thriller|drama|comedy|western|romance|mystery|musical|documentary|fable|satire|sequel|remake|"
    "adventure|epic|biopic|farce|melodrama|whodunit"
)
NAMES = _listed(
    "Anna Moreau|Boris Kline|Clara Voss|Daniel Okoro|Elena Ruiz|Felix Brandt|Grace Tanaka|"
    "Henry Walsh|Irene Novak|Jonas Lund|Karim Haddad|Laura Bianchi|Marcus Reed|Nadia Petrov|"
    "Oscar Lindqvist|Priya Nair|Rosa Delgado|Samuel Okafor|Teresa Costa|Victor Hale"
)
PLACES = _listed("Lisbon|Prague|Oslo|Cairo|Dublin|Lima|Naples|Osaka|Boston|Geneva|Havana|Delhi")
ROLES = _listed(
    "nurse|teacher|sailor|detective|farmer|painter|pilot|widow|soldier|lawyer|baker|thief|singer|"
    "doctor|butler|gambler|student|priest|juggler|captain"
)
GOALS = _listed(
    "moves to <place>|returns home from <place>|inherits a hotel|loses a brother|opens a bakery|"
    "finds a hidden letter|robs a bank|adopts a stray dog|solves a murder|crosses the desert|"
    "falls in love with a <role>|searches for a lost <role>|trains a young <role>"
)
OCCASIONS = _listed(
    "last night|last week|on Sunday|on Friday|with my sister|with two friends|at the festival|"
    "on a long flight|in a full house|on the first day"
)

# What a review talks about, by grammatical number.
SINGULAR = _listed(
    "acting|plot|story|pace|script|dialogue|music|score|ending|camera work|direction|lighting|"
    "editing|cast|humour|opening|climax|soundtrack|lead actor|lead actress|first half|second half|"
    "final act|romance|premise|photography|sound|villain|hero|set design|narration|finale|"
    "choreography|chase|atmosphere|middle part"
)
PLURAL = _listed(
    "performances|characters|jokes|songs|costumes|effects|action scenes|actors|twists|visuals|"
    "stunts|supporting actors|flashbacks|dances|lines|landscapes|fights|child actors|love scenes|"
    "close-ups|chase scenes|set pieces|subplots|details"
)
# Those that can be counted: "it has a superb <part>".
PARTS = _listed(
    "script|plot|story|score|ending|cast|opening|climax|soundtrack|premise|villain|hero|finale|"
    "lead actor|lead actress|final act"
)
FILMS = _listed("film|movie|picture|production")
CIRCUMSTANCES = _listed(
    "in every scene|from start to finish|for most of the film|after the first hour|throughout|"
    "in the second half|at times|until the credits|more than once|as the story unfolds"
)

STRONG, MILD = 1.0, 0.5


def _opinions(**groups: str) -> dict[str, float]:
    """Expression -> sentiment, from lists named `loved`, `liked`, `disliked` and `hated`."""
    strength = {"loved": STRONG, "liked": MILD, "disliked": -MILD, "hated": -STRONG}
    return {word: strength[name] for name, words in groups.items() for word in _listed(words)}


ADJECTIVES = _opinions(
    loved="superb|brilliant|wonderful|magnificent|gripping|excellent|masterful|outstanding|"
    "unforgettable|perfect",
    liked="charming|clever|elegant|witty|fresh|good|lively|warm|amusing|engaging",
    disliked="dull|bland|weak|flat|slow|shallow|clumsy|predictable|bad|confusing",
    hated="dreadful|awful|terrible|tedious|lifeless|unbearable|atrocious|pathetic|abysmal|painful",
)
FEELINGS = _opinions(
    loved="thrilled|overjoyed|deeply moved",
    liked="amused|pleased|impressed",
    disliked="bored|annoyed|disappointed",
    hated="disgusted|furious|bored to tears",
)
NOUNS = _opinions(
    loved="triumph|masterpiece|gem",
    liked="treat|pleasure|success",
    disliked="letdown|muddle|bore",
    hated="disaster|mess|failure",
)
ADVERBS = _opinions(
    loved="beautifully|brilliantly|superbly",
    liked="nicely|skilfully|neatly",
    disliked="poorly|carelessly|lazily",
    hated="terribly|horribly|shamefully",
)
# Third person singular; `plural_verb` gives the other form.
VERBS = _opinions(
    loved="dazzles|shines|stays with you|takes your breath away",
    liked="works|convinces|hits the right note|grows on you",
    disliked="drags|falls flat|misses the mark|runs out of ideas",
    hated="fails|falls apart|puts you to sleep|insults the audience",
)
ATTITUDES = _opinions(
    loved="loved|adored",
    liked="liked|enjoyed",
    disliked="disliked|regretted",
    hated="hated|loathed",
)
VERDICTS = _opinions(
    loved="it deserves every prize|it is the best film of the year",
    liked="I can recommend it|it is worth the ticket",
    disliked="I expected more|I looked at my watch",
    hated="I want my money back|it is the worst film of the year",
)
TASKS = _listed("shot|written|filmed|edited|directed|staged|paced|told|performed|recorded|designed")

NEGATORS = ("not", "never", "hardly", "nothing", "neither", "nor")
# How a word just before an opinion changes its strength.
DEGREES = {
    "very": 1.5,
    "truly": 1.5,
    "utterly": 1.5,
    "really": 1.5,
    "incredibly": 1.5,
    "rather": 0.75,
    "fairly": 0.75,
    "slightly": 0.5,
    "somewhat": 0.5,
}


def plural_verb(verb: str) -> str:
    """The plural form of a third person singular verb phrase: "misses the mark" -> "miss ..."."""
    head, *rest = verb.split(" ")
    head = head[:-2] if head.endswith("sses") else head[:-1]
    return " ".join([head, *rest])
