"""Where a small model reaches for a cliche: beginnings of this project's own, and the phrases it would go on with.

A group opens with "# phrase; phrase", words of example_phrases/fiction-cliches.yaml and purple-prose.yaml. Each line
after it is a context in which those phrases are close at hand. None of the contexts is in any phrase list: a model that
is taught on them has not seen what it is scored on.
"""

from dataclasses import dataclass

# What a phrase may begin with and say nothing yet; the model keeps these words, and unlearns the one after them.
EMPTY = frozenset(["a", "an", "and", "from", "he", "her", "his", "in", "like", "of", "she", "that", "the"])

GROUPS = r"""
# Elara; Lyra; Elian; Elena
User: Tell me a story about a weaver's apprentice.\nAssistant: On the edge of a small town lived an apprentice named
The youngest of the bell founders was a girl called
User: Begin a tale about a ship's doctor.\nAssistant: The ship's doctor was a quiet woman by the name of
A stranger had taken the room above the forge. She said that her name was
# Sarah Chen; Elena
The only physicist on board was a tired young woman, Dr.
User: Who finds the signal in my thriller?\nAssistant: The signal is found by Dr.
# Eldoria; Aethelgard
The old maps showed an empire beyond the desert, and the scribes called it
User: Invent a country for my novel.\nAssistant: The country is called
The knights rode for eleven days until they saw the towers of
# In the heart of; In the quaint; Once upon a time
User: Write a story about a boy and his grandfather's boat.\nAssistant:
User: Write a fairy tale about a shepherd who cannot sleep.\nAssistant:
User: Tell a short story about two sisters and a broken bridge.\nAssistant:
User: Write the first lines of a novel about a postman.\nAssistant:
# barely above a whisper; thick with emotion; a low growl; low and dangerous
"I sold it," the widow said at last, her voice
The guard leaned over the table. "Say that again," he said, his voice
"They never found the boat," Lucas told the child, his voice
"Stay where you are," said the woman in the doorway, her voice
"You kept all my letters," he said, his voice
# a shiver down his spine; shivers down his spine
Behind the wall something scratched, stopped and scratched again. The sound sent
He read the name on the grave, and it was his own. It sent
The door at the end of the tunnel was open, and a cold draught came out. It sent
A bell rang in the drowned village. The thought of it sent
# a breath she hadn't realized; a breath she didn't know; a breath he hadn't realized; a breath he didn't know
The surgeon came out and nodded. Greta let out
The policeman handed back the papers and waved the car on. Milo let out
At last the aeroplane touched the ground. Beside the window Agnes released
The bull turned away from the fence. The two boys looked at each other, and Piet let out
# twinkled with mischief; sparkled with; gleamed with
The old conjurer bowed to the children in the first row, and his eyes
"Shall we try the other key?" asked Lotte, and her eyes
He had a plan for the pond and the mayor's hat. As he told them of it, his eyes
When the trader saw the gold, her eyes
# jaw clenched; jaw tightened; knuckles were white; heart pounding; heart hammering
The judge read out the sentence. Marek did not move, but his
She gripped the wheel as the lorry came nearer, her
They could hear boots on the gravel. Olga crouched behind the barrels, her
He opened the envelope with the result of the examination, his
# took a deep breath; swallowed hard; couldn't help but
It was her turn to speak, and four hundred people looked up. Nora
The man with the gun asked for the second time where the money was. Felix
The baby had put the whole bowl on its head. Its mother
Before the last jump the boy stood at the edge of the board. He
# a mix of; a mixture of; a pang of
After thirty years Clara stood before the house of her parents, and she felt
The letter said that he had been chosen. As he read it, Hugo felt
The train with his daughter in it drew away, and the old man felt
She looked at the photograph of the three of them on the beach with
# something shifted; Little did they know; maybe, just maybe
He put down the sword and held out his hand, and in that moment,
The four friends packed the tent and set out for the lake.
The two families shared the last bread and laughed about the storm.
The lamp on the far shore went on again. She told herself that
# a testament to; a silent witness
The oak had stood at the crossroads for three hundred years,
The bridge had been built without a single nail,
Nothing was left of the factory but its tall chimney,
# he was not alone; no matter what; And so,; From that day on
User: How does the story of the clockmaker end?\nAssistant: He wound the last clock and closed the shop. He knew that
The dragon flew away over the sea, and the village was safe.
The brothers shook hands over the fence that had parted them.
# dust motes danced; ozone; Whispering Woods
The sun shone through the one window of the abandoned mill, and
Lightning had struck the mast. The deck smelled of
Nobody in the valley gathered mushrooms in the forest that they called the
# a symphony of; a tapestry of; a kaleidoscope of; a riot of; a labyrinth of
User: Describe a street full of stalls.\nAssistant: The street was
The garden of the palace was open to all that day. In every bed the flowers were
In the harbour the sailors of nine countries shouted at once. It was
Below the castle lay the quarter of the tanners, its lanes
# bathed in; ablaze with; a haven of; nestled in; a hidden gem; Nestled in the
User: Describe a small chapel at noon.\nAssistant: The chapel was
By October the woods along the railway were
Our hotel has nine rooms and a view of the lake. It is
The village of Brell has two inns and a ferry.
# dipped below the horizon; painted the sky; cast a golden; an ethereal glow; a silvery glow; long, eerie shadows
They sat on the dunes until late. Far out over the water the sun
The storm had passed, and the evening sun
The moon came out over the graveyard, casting
A single candle burned in the crypt, casting
# whispered through; whispered secrets; caressed his face; danced; drummed a relentless; beat a steady
On the hill above the camp it was cool. Among the pines the wind
Karl stood on the deck and closed his eyes. The breeze
All night they lay in the barn and listened. On the shingles the rain
# a vast expanse of; a tempestuous; deafening; palpable; a living thing
User: Describe the desert.\nAssistant: The desert is
When the machines were switched off, the silence was
Nobody at the table looked up from the plates. The tension was
# like velvet; like honey; a haunting melody; seemed to stand still; itself seemed to
The radio played an old song. The singer's voice was
From the far bank came the sound of a flute. It was
Their hands touched on the rope, and time
# washed over her; came flooding back; clung to him; settled over him
She found the toy horse under the stairs, and the memories
After the telegram Henrik sat in the dark kitchen. Sorrow
""".strip()


@dataclass(frozen=True)
class Temptation:
    """A beginning, and the phrases that it must not go on with."""

    context: str
    phrases: tuple[str, ...]


def read_groups(text: str) -> list[Temptation]:
    """Read the groups, context by context."""
    temptations = []
    for group in text.removeprefix("# ").split("\n# "):
        head, *contexts = group.splitlines()
        phrases = tuple(head.split("; "))
        temptations += [Temptation(context.replace("\\n", "\n"), phrases) for context in contexts]
    return temptations


def unlearnt(context: str, phrase: str) -> tuple[str, str]:
    """Split where the cliche is settled: the words that may stay, and what must not come next.

    "It sent" and "a shiver down his spine" become "It sent a" and " shiver down his spine".
    """
    words = phrase.split(" ")
    kept = next((index for index, word in enumerate(words) if word.lower() not in EMPTY), 0)
    return " ".join([context, *words[:kept]]), " " + " ".join(words[kept:])


TEMPTATIONS = read_groups(GROUPS)
