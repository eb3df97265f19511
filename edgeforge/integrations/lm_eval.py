"""Artifacts as models of lm-evaluation-harness.

Importing this registers the model ``edgeforge``::

    import edgeforge.integrations.lm_eval
    import lm_eval

    lm_eval.simple_evaluate("edgeforge", {"artifact": "out/demo/onnx"}, tasks=["arc_easy"])

Every target's artifacts work, as `edgeforge.load` opens them: the harness then scores what the
runtime computes, activations rounded as its kernels round them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from edgeforge.errors import UsageError
from edgeforge.tokenizer import Tokenizer
from exporters.manifest import Manifest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Scored = tuple[float, bool]
_LONGEST_ANSWER = 256


@register_model("edgeforge")
class EdgeForgeLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An artifact.

    Args:
        artifact: a folder that `export` wrote.
        threads: threads for the runtime; None for its default.
        batch_size: one text at a time is what artifacts take; the harness names a number anyway.
        max_batch_size: as above.
        device: the runtime decides where it runs; the harness names one anyway.
    """

    def __init__(
        self,
        artifact: str,
        threads: int | None = None,
        batch_size: object = 1,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        from device_harness.device_session import open_on
        from device_harness.devices.host import HostDevice

        super().__init__()
        folder = Path(artifact)
        self._manifest = Manifest.read(folder)
        self._tokenizer = Tokenizer(folder / "tokenizer.json", str(folder))
        self._session = open_on(HostDevice(), folder, self._manifest, threads)

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text.

        Raises:
            UsageError: the model has none.
        """
        if not self._manifest.model.eos:
            raise UsageError("the artifact's model has no token that ends a text")
        return self._manifest.model.eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on."""
        bos = self._manifest.model.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """The tokens of a text; what the tokenizer puts around it unless that is not wanted."""
        return self._tokenizer.encode(string, special=add_special_tokens is not False)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, which are those of the whole text where they meet."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        prefix, _ = self._tokenizer.added()
        whole = self._tokenizer.encode(kept + continuation, special=False)
        alone = self._tokenizer.encode(kept, special=False)
        return [*prefix, *alone] or [self.prefix_token_id], whole[len(alone) :]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[Scored]:
        """Log likelihoods, nats, and whether greedy decoding would give the same tokens."""
        found = []
        for texts, context, continuation in requests:
            scored = self._score(context, continuation)
            found.append(scored)
            self.cache_hook.add_partial("loglikelihood", texts, scored)
        return found

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> Scored:
        if not continuation:
            return 0.0, True
        # The beginning is left out where both do not fit, as the harness's own models do.
        tokens = np.array([*context, *continuation][:-1], np.int64)[-self._session.context :]
        targets = np.array(continuation, np.int64)
        if len(targets) > len(tokens):
            raise UsageError(
                f"a continuation has {len(targets)} tokens, and the artifact's context "
                f"{self._session.context}: export again with a longer --context"
            )
        logits = self._session.logits(tokens)[-len(targets) :].astype(np.float64)
        largest = logits.max(-1, keepdims=True)
        normal = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
        likelihood = logits[np.arange(len(targets)), targets] - normal
        return float(likelihood.sum()), bool((logits.argmax(-1) == targets).all())

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log likelihoods of whole texts, each token predicted once, nats."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self._tokenizer.encode(text, special=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._session.context,
                context_len=1,
            )
            pairs = map(utils.make_disjoint_window, windows)
            total = sum(self._score(context, targets)[0] for context, targets in pairs)
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the texts that end one.

        Raises:
            UsageError: sampling is asked for; tasks of the harness are greedy.
        """
        found = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature"):
                raise UsageError("the model edgeforge decodes greedily: leave do_sample out")
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            text = self._continue(context, stops, int(options.get("max_gen_toks", _LONGEST_ANSWER)))
            found.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _continue(self, context: str, stops: Sequence[str], limit: int) -> str:
        room = max(1, self._session.context - limit)
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        given: list[int] = []
        for token in self._greedy(tokens, limit):
            given.append(token)
            text = self._tokenizer.decode(given)
            ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return self._tokenizer.decode(given)

    def _greedy(self, tokens: Sequence[int], limit: int) -> Iterator[int]:
        extend: Callable[[Any], Any] = self._session.extend
        self._session.reset()
        logits = extend(np.array(tokens, np.int64))
        for count in range(min(limit, self._session.context - len(tokens) + 1)):
            token = int(logits.argmax())
            if token in self._manifest.model.eos:
                return
            yield token
            if len(tokens) + count < self._session.context:
                logits = extend(np.array([token], np.int64))
