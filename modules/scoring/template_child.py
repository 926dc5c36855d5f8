"""Renders an untrusted chat template in a process of its own, with limits on time and memory.

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
except ImportError:  # Windows: the parent process's timeout is the only limit
    resource = None

LONGEST = 10_000_000  # characters of a text
MEMORY = 2**30  # bytes that rendering may add


def outcomes(request: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The outcome of each of a request's `conversations`, lists of messages, up to the first that exceeds the limits.

    A request has a `template` and its `settings` as well. An outcome is a `text`, up to the beginning of the answer; or
    a `refusal`, the template's words; or which limit was exceeded (`beyond`).
    """
    for messages in request["conversations"]:
        outcome = _outcome(request["template"], request["settings"], messages)
        yield outcome
        if "beyond" in outcome:
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
    """Limit this process to so many more seconds of processor time and MEMORY more bytes."""
    if resource is None:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        "RLIMIT_CPU": math.ceil(usage.ru_utime + usage.ru_stime + seconds),
        "RLIMIT_AS": psutil.Process().memory_info().vms + MEMORY,
        "RLIMIT_CORE": 0,
    }
    for name, limit in limits.items():
        kind = getattr(resource, name)
        _, hard_limit = resource.getrlimit(kind)
        limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
        resource.setrlimit(kind, (limit, hard_limit))  # beyond the hard limit, a process is killed without a reason


def main() -> None:
    """Answer the request that standard input brings."""
    request = json.loads(sys.stdin.buffer.read())
    _limit(request["seconds"])
    for outcome in outcomes(request):
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
