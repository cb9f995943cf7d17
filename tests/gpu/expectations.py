"""What an answer's temperatures must have been, by transformers and plain Python."""

from dataclasses import dataclass, field
from typing import Any

import torch

from adaptive_head import AdaptiveHead, load_head
from adaptive_head.head import gumbel_noise
from tests.gpu.engine import MARKER, START, Material, Request

# Millionths by which a schedule's temperature may be off: it is computed in float32.
TOLERANCE = 20
# A choice of a head is clear, and a token the likeliest, where its score or logit leads by this
# share of the range of all. In bfloat16, 1 in 1,400 of such choices of a head was another one.
SCORE_MARGIN, LOGIT_MARGIN = 0.15, 0.04
MIN_AGREEMENT = 0.98


class Reference:
    """The same model in float32 on the host, its weights rounded as the engine's are."""

    def __init__(self, material: Material, device: str) -> None:
        from transformers import LlamaForCausalLM

        rounded = torch.float32 if device == "cpu" else torch.bfloat16
        model = LlamaForCausalLM.from_pretrained(material.model, dtype=rounded)
        self._model = model.float().eval()
        self.networks: dict[str, AdaptiveHead] = {
            name: load_head(folder).network for name, folder in material.heads.items()
        }

    @torch.inference_mode()
    def run(self, prompt: list[int], token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [tokens, d] and logits [tokens, vocabulary] that each token came from."""
        inputs = torch.tensor([prompt + token_ids[:-1]])
        hidden = self._model.model(inputs).last_hidden_state[0, len(prompt) - 1 :]
        return hidden, self._model.lm_head(hidden)


@dataclass
class Alignment:
    """Compares answers with the reference, and adds up what it finds.

    Attributes:
        num_exact: tokens whose temperature does not depend on the model, and is right.
        num_clear: tokens for which a head's choice is clear, and num_agreeing of them.
        num_greedy: tokens at temperature 0 with a clear maximum, and num_argmax of them.
    """

    reference: Reference
    networks: dict[str, AdaptiveHead] = field(default_factory=dict)
    num_exact: int = 0
    num_clear: int = 0
    num_agreeing: int = 0
    num_shifted: int = 0
    num_greedy: int = 0
    num_argmax: int = 0

    def add(self, request: Request, answer: dict[str, Any]) -> None:
        """Look at one answer.

        Raises:
            AssertionError: a temperature is missing, changes where it must not, or is wrong though
                it does not depend on the model.
        """
        micros, token_ids, options = answer["micros"], answer["token_ids"], request.options
        if options is None:
            assert micros is None, "an ordinary answer came with temperatures"
            return
        assert micros is not None, "an adaptive answer came without temperatures"
        assert len(micros) == len(token_ids), f"{len(micros)} for {len(token_ids)} tokens"
        if options.level == "sequence":
            assert len(set(micros)) == 1, f"a sequence-level choice changed: {micros}"
        if options.policy == "head":
            self._add_head(request, answer)
            return
        expected = _expect(request, token_ids)
        wrong = [i for i, e in enumerate(expected) if abs(micros[i] - e) > TOLERANCE]
        assert not wrong, (
            f"{options.policy}: token {wrong[0]} of {len(micros)} has {micros[wrong[0]]}, "
            f"not {expected[wrong[0]]} millionths"
        )
        self.num_exact += len(micros)

    def _add_head(self, request: Request, answer: dict[str, Any]) -> None:
        options, micros = request.options, answer["micros"]
        assert options is not None
        name = f"{options.name}.{options.generation}"
        network = self.networks.get(name, self.reference.networks[options.name])
        hidden, logits = self.reference.run(request.prompt, answer["token_ids"])
        scores = network(hidden)
        if options.select == "sample":
            positions = torch.arange(len(hidden)) + len(request.prompt) - 1
            seeds = torch.full_like(positions, request.params["seed"])
            scores = scores + gumbel_noise(seeds, positions, scores.shape[-1])
        if options.level == "sequence":
            scores = scores[:1].expand_as(scores)
        values = torch.tensor(network.config.temperatures, dtype=torch.float64)[scores.argmax(-1)]
        values = (values * options.scale).clamp(options.min, options.max)
        expected = (values * 1e6 + 0.5).floor().long().tolist()
        is_clear = _is_clear(scores, SCORE_MARGIN)
        for index in is_clear.nonzero().flatten().tolist():
            self.num_clear += 1
            self.num_agreeing += micros[index] == expected[index]
            self.num_shifted += micros[index] == expected[(index + 1) % len(expected)]
        is_clear = _is_clear(logits, LOGIT_MARGIN)
        for index, micro in enumerate(micros):
            if micro == 0 and is_clear[index]:
                self.num_greedy += 1
                self.num_argmax += answer["token_ids"][index] == int(logits[index].argmax())

    def judge(self) -> dict[str, Any]:
        """The figures.

        Raises:
            AssertionError: heads and reference do not agree, or there was too little to tell.
        """
        assert self.num_clear >= 30, f"only {self.num_clear} clear choices: too few"
        agreement = self.num_agreeing / self.num_clear
        shifted = self.num_shifted / self.num_clear
        assert agreement >= MIN_AGREEMENT, f"heads agree in {agreement:.1%} of clear choices"
        assert shifted < agreement - 0.1, "a shift by one token would not have been noticed"
        assert self.num_argmax >= MIN_AGREEMENT * self.num_greedy, (
            f"{self.num_argmax} of {self.num_greedy} tokens at 0 are the likeliest"
        )
        return {
            "exact": self.num_exact,
            "clear_choices": self.num_clear,
            "agreement": agreement,
            "shifted_by_one": shifted,
            "greedy_tokens": self.num_greedy,
        }


def _is_clear(scores: torch.Tensor, margin: float) -> torch.Tensor:
    """bool [rows]: whether the first of [rows, choices] leads the second by far."""
    top = scores.topk(2, dim=-1).values
    spread = (scores.amax(-1) - scores.amin(-1)).clamp_min(1e-9)
    return (top[:, 0] - top[:, 1]) / spread > margin


def _expect(request: Request, token_ids: list[int]) -> list[int]:
    """Millionths of a policy that depends on the place or on the text alone."""
    options = request.options
    assert options is not None and not options.num_written
    text: list[int] = []
    is_answer = False
    values = []
    for place, token in enumerate(token_ids):
        if text[-3:] in (MARKER, START):
            is_answer = text[-3:] == MARKER
        if options.policy == "schedule":
            start, end, num_tokens = options.parameters
            value = start + (end - start) * min(place / num_tokens, 1.0)
        elif options.policy == "two_phase":
            value = options.parameters[is_answer]
        else:
            value = options.parameters[0]
        values.append(round(min(max(value * options.scale, options.min), options.max) * 1e6))
        text.append(token)
    return values
