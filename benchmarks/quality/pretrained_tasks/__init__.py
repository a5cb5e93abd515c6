"""Real pretrained models, each with data that it has not seen, as tasks of the quality benchmark.

The weights come inside packages of the extra `pretrained-models`; nothing is downloaded when a task runs, and none of them are in our own
package. What each is licensed under stands at the function that loads it. Beside them a small transformer of our own,
trained for long, which is made when it is first asked for.

Nothing is ever tuned on the held-out tasks. They have data of their own, and two kinds of model that no development task has; the
development tasks use none of the data of the quality benchmark's other held-out tasks either.

Shapes: `B` examples of a batch, `T` tokens or characters of a text, `H` and `W` pixels.
"""

from __future__ import annotations

import functools

from tasks import docstrings, encode, wikitext

from .characters import other_text
from .documentation import documentation, manual_topics, pieces
from .forecasting import terrain
from .minilm import InBf16, adapted, frozen, last_layers, masked_language, packages, pairs, polarity, valence
from .pictures import digits, letters, noisy_words
from .problems import Problem, Task

__all__ = ["PRETRAINED_DEVELOPMENT", "PRETRAINED_HELD_OUT", "PRETRAINED_MORE", "Problem"]

PRETRAINED_DEVELOPMENT: dict[str, Task] = {
    "minilm polarity": Task(polarity, 100),
    "minilm polarity lora": Task(functools.partial(polarity, change=adapted), 150),
    "minilm polarity head": Task(functools.partial(polarity, change=frozen), 150),
    "minilm polarity last layers": Task(functools.partial(polarity, change=last_layers, examples=300), 150),
    "minilm valence": Task(valence, 100),
    "minilm valence off-centre": Task(functools.partial(valence, mean=3.0), 100),
    "minilm valence bf16": Task(functools.partial(valence, change=InBf16), 100),
    "minilm masked numpy": Task(lambda seed: masked_language(seed, pieces(documentation("numpy"))), 100),
    "minilm pairs numpy": Task(lambda seed: pairs(seed, documentation("numpy")), 100),
    "efficientnet letters": Task(letters, 150),
    "transformer sklearn": Task(lambda seed: other_text(seed, lambda: encode("\n".join(documentation("sklearn")))), 300),
}
PRETRAINED_HELD_OUT: dict[str, Task] = {
    "minilm packages": Task(packages, 100),
    "minilm packages lora bf16": Task(functools.partial(packages, change=adapted, half=True), 150),
    "minilm masked manual": Task(lambda seed: masked_language(seed, pieces(manual_topics())), 100),
    "minilm pairs few": Task(lambda seed: pairs(seed, documentation("networkx"), 200), 100),
    "efficientnet digits": Task(digits, 150),
    "ocr words": Task(noisy_words, 200),
    "fracast terrain": Task(terrain, 200),
    "transformer torch": Task(lambda seed: other_text(seed, docstrings), 500),
}
# With --data: WikiText-2.
PRETRAINED_MORE: dict[str, Task] = {"transformer wikitext": Task(lambda seed: other_text(seed, wikitext), 500)}
