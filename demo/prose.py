"""Plain narrative prose from a seed: small scenes to fine-tune a small model on, with no download.

SCENES knows what happens, sentence by sentence and in order; POOLS knows the weather, days, hours and the like.
A scene begins with "# season; places; things". Each line after it is a sentence (or a question and its answer);
"/ " gives another way to say the line before it, "? " marks one that may be left out. In a line, [a|b] is one of
both, {at} the place, {thing} the thing, {A} and {he}/{him}/{his} the first person, {B} and {she}/{her}/{hers} the
second. One of the two is a woman and one a man, either way round, so that a pronoun never has two meanings.
"""

import random
import re
from dataclasses import dataclass

NAMES = {
    "woman": "Tilva|Ennet|Oriske|Bredda|Selmy|Haldra|Winnet|Corla|Mirsel|Yorune|Devny|Pellu|Ismere|Anva|Lodeva",
    "man": "Tobren|Aldrik|Jorven|Osmer|Haskin|Davo|Ruvan|Emmo|Kestor|Brannoc|Wilbrek|Anscot|Perrod|Edlo|Martol",
}
PRONOUNS = {"woman": ("she", "her", "her"), "man": ("he", "him", "his")}
POOLS = {
    "cold": "It had frozen in the night.|A thin snow lay on the roofs.|The puddles were covered with ice.|"
    "It was one of the short days of December.|The windows were white with frost.|An icy wind blew.",
    "warm": "It had not rained for two weeks.|The day was warm and still.|The hay had been brought in.|"
    "It was the hottest week of the summer.|Swallows flew low over the road.|A light wind came from the south.",
    "any": "It had rained all night.|The sky was grey, and there was little wind.|The wind had turned to the west.|"
    "Low clouds hung over the hills.|The streets were still wet.|It was a dull day, and few people were about.",
    "day": "Monday|Tuesday|Wednesday",
    "later": "Thursday|Friday|Saturday",
    "hour": "six o'clock|seven|half past seven|eight o'clock|a quarter past eight|nine|half past nine|ten o'clock",
    "drink": "tea|coffee|cocoa|hot milk|cider",
    "food": "bread and cheese|cold potatoes|pea soup|plum cake|boiled eggs|pancakes|smoked fish",
    "number": "three|four|five|seven|nine|eleven|twelve",
}
SCENES = """
# any; the workshop|the back room of the shop|the shed by the gate|the cellar; clock|radio|sewing machine|typewriter
On {day} {A} brought a broken {thing} to {at}, wrapped in [a blanket|a sheet|two towels].
/ {A} carried the old {thing} into {at}, where {B} was [sorting nails|sharpening a saw|sweeping up].
{B} moved [a box of screws|a tin of oil|a pot of glue] aside and [turned the {thing} round|tried its weight].
? "How long has it been like this?" {she} asked. "Since [Easter|we moved house|my uncle dropped it]," said {A}.
{She} took off the back and found [a loose screw|a bent pin|a dead moth|a knot of thread and fluff] inside.
? {A} held the torch while {she} [looked for the right tool|tried one screwdriver after another|cleaned every wheel].
It took [half an hour|an hour and two cups of {drink}|most of the morning] before the {thing} worked again.
"What do I owe you?" asked {A}. "[A jar of honey|A sack of onions|A day in the garden]," {she} said.
? {He} [thought that fair|promised it for {later}|wrote it on {his} hand] and carried the {thing} home.
# any; the station at Hollin|the halt at Mirrow Bridge|the platform in Astery; suitcase|parcel|basket|cello case
{A} reached {at} at {hour}, [two minutes|a minute|a little] after the train had left.
/ The early train had gone when {A} came to {at} with [a heavy|a wet|a borrowed] {thing}.
{He} put down the {thing} and read the timetable [twice|from top to bottom|with one finger on the glass].
{B} was [sweeping the steps|watering the flower box|painting a bench] and came over to {him}.
"The next one goes in [forty minutes|an hour|two hours]," {she} said, "[but it is often late|and it stops everywhere]."
? "Is there a bus?" asked {A}. "There was one until [the spring|last year|the road was closed]," said {B}.
? {She} unlocked the waiting room and [brought {drink}|fetched a chair|switched on the light|gave {him} a newspaper].
They talked about [the price of tickets|old engines|towns they both knew] until the signal changed.
When the train came in, {she} lifted the {thing} up the step and [waved to the driver|told {him} where to change].
# warm; the orchard above the river|the long orchard|the priest's garden; cherries|plums|apricots|early pears
{A} and {B} began to pick the {thing} in {at} at {hour}.
{He} stood on the ladder, and {she} [held the basket|reached up with the bucket|carried the full baskets to the cart].
? "[Leave the green ones|Take the left side first|Mind the wasps]," {she} called.
After [an hour|two rows|the third tree] the ladder [slipped|sank in], and {he} [jumped|caught hold of a branch].
"Are you hurt?" asked {B}. "No," {he} said, "but [my sleeve is torn|I have lost a shoe|there go the best ones]."
? They moved the ladder to firmer ground and tied it to the trunk with [a rope|{hers} belt|an old strap].
By evening there were {number} crates by the gate, and {B} [counted them twice|wrote the number on the wall].
? They ate {food} on the grass before they [drove home|loaded the cart|washed the baskets].
# any; the bakery in Tanner Lane|the bakery on the square|the village bakery; oven|kneading machine|mixer
At {hour} the {thing} in {at} stopped [without a sound|with a loud crack], and {A} could not get it to start again.
/ {A} opened {at} on {day} and could not get the {thing} to start.
{He} [checked the fuse|pulled out the plug|looked under the cover] and then sent for {B}, who lived next door.
{B} came in [boots and a coat|slippers|a long scarf] with a [torch|toolbox] in {hers} hand.
"It is the [belt|switch|motor]," {she} said. "I can [get one by noon|borrow one from the mill|make a new one]."
? Until then {A} [weighed the flour|swept out the flour store|sold what was left from the day before].
? Nobody in the queue [complained|went away|minded the wait], because {he} gave everyone a cup of {drink}.
In the afternoon {she} put in the new part, and the {thing} ran [more quietly than before|as well as ever].
{He} [gave|sent] {her} {number} loaves for it and [went to bed early|oiled the {thing} every week from then on].
# any; the house by the weir|the upper farm|number nine|the old toll house; letter|postcard|telegram
{A} found {number} [bills|newspapers|catalogues] and a {thing} behind the door of {at}.
/ On {later} a {thing} for {A} came to {at}, [wet from the rain|a week late|with the wrong number on it].
The {thing} was from {B}, who had [been at sea|lived on the coast|worked abroad] for {number} years.
{He} read it [standing up|at the kitchen table|by the window] and then read it again.
"I am coming on {later}," {B} had written, "[and I shall be hungry|with two dogs and a trunk|if the roads are open]."
? {A} looked at the calendar and saw that it was {later} already.
{He} [aired the spare room|swept the hall|lit the stove] and put {food} on the table.
At {hour} there was a knock, and {B} stood on the step with [wet hair|a parcel under one arm|mud on {hers} boots].
? "You have [grown thin|cut your hair|painted the door]," {she} said. "A good while ago," {he} answered.
# any; the school in Orme|the mill school|the upper classroom; globe|wall map|microscope|skeleton
{A} had taught in {at} for [two weeks|a month|one winter] when the {thing} disappeared.
{He} asked the children on {day}, but no one [had seen it|answered|looked up from the desk].
In the break {B}, the [caretaker|cook|school nurse], came to the door with a [bunch of keys|bucket].
"[I have it|It is downstairs]," {she} said. "It had [got wet|lost a screw|come loose], and I wanted to mend it."
? "You might have told me," said {A}. "You might have asked," said {B}.
They went down to {hers} room, where the {thing} was standing on [a newspaper|two chairs|the windowsill].
? {She} had [glued|mended] it so well that the damage could [hardly|no longer] be seen.
{He} thanked {her} and [carried it up the stairs|let the children carry it back|asked {her} to come and show it].
# any; the shop on the corner|the second-hand shop|the shop by the bridge; chair|mirror|lamp|violin|teapot
{A} had seen the {thing} in the window of {at} every day for [a week|a month].
On {day} {he} went in and asked {B} [what it cost|for the price|whether it was still for sale].
"[Forty|Sixty|Eighty]," {she} said, "[but it has a scratch|because it is older than I am|and I have had offers]."
{He} [counted {his} money|looked in {his} purse|turned out {his} pockets] and was {number} short.
? {She} looked at {his} hands, which were [rough|stained with ink|cracked from the cold].
"What is your work?" {she} asked. "I [bind books|lay floors|mend nets|paint signs]," said {A}.
"[I can use that|That would suit me]," said {B}. "Come on {later}, and we will call it even."
{A} came at {hour}, [worked until dark|did it in one day], and took the {thing} home [on a handcart|in a blanket].
# any; the ferry house|the landing at Grell|the old jetty; goat|piano|wardrobe|stove
{A} waited at {at} with a {thing} and [a rope|two blankets|a letter for the other side].
{B}, who ran the ferry, [walked round the {thing}|shook {hers} head|pushed back {hers} cap] and [sighed|whistled].
"Will it go?" asked {A}. "[If you stand at the back|If the wind drops|With the boards down]," {she} said.
They [laid boards from the bank|tied the {thing} to the rail|moved {number} sacks aside] and pushed off slowly.
? In the middle of the river the boat [tilted|turned a little|scraped over a sandbank], and {he} held on to the rail.
? "Talk about something else," said {B}, so {he} told {her} about [{his} sister's wedding|the flood|the price of hay].
On the far side [two boys|a farmer|the miller] helped them to get the {thing} up the bank.
{She} would not take money, but {she} [drank a cup of {drink} with {him}|accepted {food}] before {she} rowed back.
# warm; the allotments|the garden behind the church|the plot by the canal; fox|badger|stray dog
For {number} nights a {thing} had come to {at} and [dug up the beds|emptied the bins|frightened the hens].
{A} wanted to [build a fence|dig a pit|set a cage], but {B} asked {him} to wait.
? "It only comes for the [compost|eggs|fallen fruit]," {she} said. "Take that away first."
On {later} they [put a lid on the heap|cleared the ground|raked the paths] and sat down in the shed for the night.
{B} had brought {food}, and {A} had [a flask of {drink}|a pack of cards|two cushions].
[Towards midnight|Before dawn|After the church clock had struck ten] the {thing} came along the path and stopped.
It [sniffed at the gate|walked once round the shed|looked about for a while] and went away [again|over the wall].
"[That was all|You see]," said {B}. "Now we can sleep," said {A}, and [locked up|put out the lamp].
# any; the library in Castle Street|the reading room|the town library; songbook|cookbook|bird guide|school atlas
{A} brought a {thing} back to {at} on {day}, {number} years late.
/ While {he} was clearing the attic, {A} found a {thing} that belonged to {at}, and took it back there.
{B} opened it at the desk and [looked for the stamp|turned the pages slowly|smelled the paper].
"Who borrowed it?" {she} asked. "My [grandmother|father|cousin]," said {A}, "[and I can pay|but I read it, too]."
? Between two pages lay [a pressed fern|a tram ticket|a shopping list], and {B} put it into an envelope for {him}.
{She} worked out the fine on a slip of paper, [laughed|showed it to {him}], and tore it up.
? "[Borrow something newer|Take a card of your own]," {she} said, "[and bring that back in time|while you are here]."
{He} left with [a novel|a book about stars|a guide to mushrooms] and was back on {later} to [return|renew] it.
# cold; the kitchen of the inn|the kitchen at the upper farm|the canteen; soup|stew|sauce|goulash
There were {number} guests in the dining room of the inn, and {A} had [burnt|oversalted|forgotten] the {thing}.
/ {A} cooked alone in {at} for the first time on {day}, and the {thing} went wrong.
{He} [opened the window|moved the pot off the heat|stood there with the spoon] and called {B}.
{B} [tasted it|looked into the pot|took an apron from the hook] and asked for [potatoes|a clean pot|milk and flour].
? "How long have they been waiting?" {she} asked. "Since {hour}," said {A}, "and they can see the clock."
{She} [peeled|stirred|chopped], {he} [washed up|cut bread|laid the plates], and they did not [talk|stop once].
After [twenty minutes|half an hour] {he} carried the first bowls out, and [they came back empty|nobody complained].
? Later they sat by the stove with {drink}, and {she} wrote down for {him} [how it was done|what to buy].
# cold; the hut below the pass|the forester's hut|the hut by the lake; sledge|lantern|snow shovel|chair
{A} and {B} reached {at} [an hour before dark|at dusk|as it began to snow] on {day}.
The door was locked. "[Under the third stone|Above the beam]," said {B}, who had been there [as a child|twice before].
/ The door was blocked by a drift, and they dug with [their hands|a plank|two pot lids] until it opened.
Inside it was [dark|as cold as outside|dry], and a broken {thing} lay [on the floor|by the door|in the corner].
{She} made a fire with [pine cones|an old crate|dry branches] while {he} [fetched water|unrolled the blankets].
They had {food} for supper and [listened to the wind|hung their socks over the stove|played cards].
? "How far is it tomorrow?" {he} asked. "[Four hours|Nine miles|Downhill all the way]," {she} said.
In the morning {he} [mended the {thing}|swept the floor|split some wood], and they [went on|took the lower path].
""".strip()


@dataclass(frozen=True)
class Scene:
    """What can happen at one kind of place; each step has its wordings and whether it may be left out."""

    season: str
    places: list[str]
    things: list[str]
    steps: list[tuple[bool, list[str]]]


def read_scene(block: str) -> Scene:
    """Read a scene from its lines, the first of which has lost its "# "."""
    head, *lines = block.strip().splitlines()
    season, places, things = head.split("; ")
    steps: list[tuple[bool, list[str]]] = []
    for line in lines:
        if line.startswith("/ "):
            steps[-1][1].append(line[2:])
        else:
            steps.append((line.startswith("? "), [line.removeprefix("? ")]))
    return Scene(season, places.split("|"), things.split("|"), steps)


ALL_SCENES = [read_scene(block) for block in SCENES.removeprefix("# ").split("\n# ")]


def cast(scene: Scene, rng: random.Random) -> dict[str, str]:
    """Choose who, where and what, once for a whole paragraph."""
    words = {name: rng.choice(pool.split("|")) for name, pool in POOLS.items()}
    words |= {"at": rng.choice(scene.places), "thing": rng.choice(scene.things)}
    kinds = rng.sample(["woman", "man"], 2)
    for letter, kind, keys in zip("AB", kinds, (("he", "him", "his"), ("she", "her", "hers")), strict=True):
        words[letter] = rng.choice(NAMES[kind].split("|"))
        words |= dict(zip(keys, PRONOUNS[kind], strict=True))
    return words | {"He": words["he"].capitalize(), "She": words["she"].capitalize()}


def say(wordings: list[str], words: dict[str, str], rng: random.Random) -> str:
    """Choose a wording, settle its brackets, put in the names, and begin with a capital."""
    text = re.sub(r"\[([^]]*)\]", lambda found: rng.choice(found[1].split("|")), rng.choice(wordings)).format(**words)
    return text[0].upper() + text[1:]


def sentences(text: str) -> int:
    """Count the sentences; a question with its "she asked" is one."""
    return len(re.findall(r'[.!?]"?(?= [A-Z"]|$)', text))


def paragraph(scene: Scene, rng: random.Random) -> str:
    """Tell a scene in order, without some of what may be left out."""
    words = cast(scene, rng)
    told = [(True, say([words[scene.season]], words, rng))]
    told += [(optional, say(wordings, words, rng)) for optional, wordings in scene.steps]
    droppable = [step for step in told if step[0]]
    rng.shuffle(droppable)
    most = rng.randint(6, 9)
    while droppable and sum(sentences(text) for _, text in told) > most:
        told.remove(droppable.pop())
    return " ".join(text for _, text in told)


def paragraphs(seed: int, count: int) -> list[str]:
    """Write `count` paragraphs; the same seed gives the same ones, and no scene follows itself."""
    rng = random.Random(seed)
    scene, written = None, []
    for _ in range(count):
        scene = rng.choice([other for other in ALL_SCENES if other is not scene])
        written.append(paragraph(scene, rng))
    return written
