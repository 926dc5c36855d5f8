"""A stranger's chat template, rendered in a process of its own that has little time and little memory.

Knows: transformers' renderer, what a process may take. Refuses to know: torch, tokenizers, what the texts are for.

`chats.py` starts this file as a program, which reads a request and answers each conversation with a line of JSON.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
from transformers.utils.chat_template_utils import render_jinja_template

from modules.runtime.errors import first_line

try:
    import resource
except ImportError:  # Windows: whoever has started this waits no longer than it should take
    resource = None

LONGEST = 10_000_000  # characters of a text
MEMORY = 2**30  # bytes that rendering may add


def outcomes(request: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What becomes of each of a request's `conversations`, lists of messages, up to the first that takes too much.

    A request has a `template` and its `settings` as well. An outcome is a `text`, to the beginning of the answer; or a
    `refusal`, the template's words; or what is `beyond` the limits.
    """
    for messages in request["conversations"]:
        found = _outcome(request["template"], request["settings"], messages)
        yield found
        if "beyond" in found:
            return


def _outcome(template: str, settings: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> dict[str, str]:
    settings = {**settings, "add_generation_prompt": True}
    try:
        (text,), _ = render_jinja_template([list(messages)], chat_template=template, **settings)
    except MemoryError:
        return {"beyond": f"takes more than {MEMORY // 2**30} GiB of memory"}
    except RecursionError:
        return {"beyond": "recurses without end"}
    except Exception as error:  # whatever a template raises, or runs into
        return {"refusal": first_line(error)}
    if len(text) > LONGEST:
        return {"beyond": f"produces a text of {len(text):,} characters"}
    return {"text": text}


def _limit(seconds: float) -> None:
    """From now on, this process may take so many seconds of the processor, and MEMORY beside what it has."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = {
        "RLIMIT_CPU": math.ceil(used.ru_utime + used.ru_stime + seconds),
        "RLIMIT_AS": psutil.Process().memory_info().vms + MEMORY,
        "RLIMIT_CORE": 0,
    }
    for name, most in allowed.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, hard))  # beyond the hard one, a process ends without a word of the reason


def main() -> None:
    """Answer the request that standard input brings."""
    request = json.loads(sys.stdin.buffer.read())
    _limit(request["seconds"])
    for found in outcomes(request):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
