"""Running the frozen language model: what it says of responses, and its output layer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_head.dtype import choose_dtype
from adaptive_head.language_model import find_language_model
from adaptive_head.lpo.records import DataError, Response

# Of float32 logits in one chunk, 64 MiB: those of a whole batch would take gigabytes.
_CHUNK_ELEMENTS = 2**24


class FrozenModel:
    """A causal LM in two halves, on either side of what enters its output layer.

    That tensor is the hidden state that a head reads. Some families scale or normalise the
    transformer's last hidden state on the way there, so it is taken where it arrives. Both halves
    are the model's own `forward` around a transformer that returns given states. So logits can be
    had for chosen positions and in chunks, and are capped and biased as the model does it, whatever
    its family.

    It runs on the GPU if there is one.

    Args:
        folder: of the model.
        dtype: in which it runs. `auto` is its checkpoint's, or float32 on a CPU that has no
            instructions for bfloat16.

    Attributes:
        unembedding: the output layer's weight [vocab, d], in the model's dtype, where it runs.
        hidden_size: d.
    """

    def __init__(self, folder: Path, dtype: str = "auto") -> None:
        # Imported here: it takes seconds, and a cache needs none of it.
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=choose_dtype(dtype)).eval()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.requires_grad_(False).to(self._device)
        output_layer = model.get_output_embeddings()
        self.unembedding: torch.Tensor = output_layer.weight.detach()
        self._exchange = _Exchange()
        output_layer.register_forward_pre_hook(self._exchange)
        self._vocab, self.hidden_size = self.unembedding.shape
        self._transformer = model.base_model
        self._given = _Given()
        # An output of the model's own class: families read different fields of it.
        some_token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        with torch.inference_mode():
            self._given.output = self._transformer(input_ids=some_token, use_cache=False)
        setattr(model, model.base_model_prefix, self._given)

    def check_tokens(self, responses: Sequence[Response]) -> None:
        """Whether the model can read these responses and their prompts.

        Raises:
            DataError: it does not know a token; names the prompt and the sample.
        """
        for response in responses:
            largest = max((*response.prompt_token_ids, *response.token_ids))
            if largest >= self._vocab:
                where = f"prompt {response.prompt_id}, sample {response.sample}"
                raise DataError(f"{where}: token {largest} is not one of the model's {self._vocab}")

    @torch.inference_mode()
    def read(
        self, batch: Sequence[Response], temperatures: tuple[float, ...], needs_logprobs: bool
    ) -> Iterator[tuple[Response, torch.Tensor, torch.Tensor]]:
        """Run the model over a batch of responses and their prompts, padded to the longest.

        Args:
            batch: responses of tokens that the model knows, to prompts that are not empty.
            temperatures: K of them, at least 0.
            needs_logprobs: whether to compute them; they are NaN otherwise.

        Yields:
            Each response, its hidden states [tokens, d] in the model's dtype, from which its
            tokens are predicted, and log P(y_t | tau_k), float32 [tokens, K], both on the CPU.
        """
        # The last token predicts nothing that is asked for.
        texts = [[*r.prompt_token_ids, *r.token_ids[:-1]] for r in batch]
        width = max(map(len, texts))
        input_ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
        entering = self._read_states(input_ids.to(self._device), mask.to(self._device))
        lengths = [len(response.token_ids) for response in batch]
        hidden = torch.cat(
            [
                states[len(text) - length : len(text)]
                for states, text, length in zip(entering, texts, lengths, strict=True)
            ]
        )
        logprobs = torch.full((len(hidden), len(temperatures)), torch.nan)
        if needs_logprobs:
            token_ids = torch.tensor([token for r in batch for token in r.token_ids])
            logprobs = self._compute_logprobs(hidden, token_ids.to(self._device), temperatures)
        yield from zip(
            batch, hidden.cpu().split(lengths), logprobs.cpu().split(lengths), strict=True
        )

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, d], in the model's dtype -> float32 logits [rows, vocab]."""
        given = hidden.unsqueeze(0).to(self._device)
        self._given.output.last_hidden_state = given
        self._exchange.begin(given)
        positions = torch.zeros(1, len(hidden), dtype=torch.long, device=self._device)
        logits: torch.Tensor = self._model(input_ids=positions, use_cache=False).logits
        return logits[0].float()

    @torch.inference_mode()
    def read_states(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The hidden states of one text, [tokens, d] in the model's dtype, on the CPU."""
        input_ids = torch.tensor([token_ids], device=self._device)
        return self._read_states(input_ids, torch.ones_like(input_ids))[0].cpu()

    def _read_states(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What enters the output layer, [batch, tokens, d].

        Raises:
            DataError: the model computes its logits without calling that layer.
        """
        self._given.output = self._transformer(
            input_ids=input_ids, attention_mask=mask, use_cache=False
        )
        self._exchange.begin(None)
        self._model(input_ids=input_ids, use_cache=False)
        if self._exchange.entering is None:
            raise DataError("the model does not call its output layer, so what enters is not known")
        return self._exchange.entering

    def _compute_logprobs(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, temperatures: tuple[float, ...]
    ) -> torch.Tensor:
        step = max(1, _CHUNK_ELEMENTS // self._vocab)
        chunks = []
        for states, tokens in zip(hidden.split(step), token_ids.split(step), strict=True):
            logits = self.compute_logits(states)
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
            scaled = torch.empty_like(logits)
            columns = []
            for temperature in temperatures:
                if temperature == 0.0:
                    columns.append(torch.zeros_like(chosen).masked_fill(chosen < 0, -torch.inf))
                else:
                    torch.div(logits, temperature, out=scaled)
                    # No overflow: the largest logit is 0.
                    normaliser = scaled.exp_().sum(dim=1).log()
                    columns.append(chosen / temperature - normaliser)
            chunks.append(torch.stack(columns, dim=1))
        return torch.cat(chunks)


def read_unembedding(model: Path | str) -> torch.Tensor:
    """The output layer's weight W [vocab, d], in the model's dtype, on the CPU.

    Raises:
        DataError: the model's logits are not `hidden @ W.T`: it scales or caps them, or adds a
            bias.
        ValueError: there is no such model.
    """
    frozen = FrozenModel(find_model_folder(model))
    weight = frozen.unembedding
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, frozen.hidden_size, generator=generator).to(weight)
    # Large enough for a cap to show, and as large in every model; where all is 0, a bias shows.
    hidden *= 1000 / (hidden @ weight.T).abs().max()
    hidden[0] = 0
    expected = (hidden @ weight.T).float()
    errors = (frozen.compute_logits(hidden) - expected).abs()
    if (errors > 0.02 * expected.abs().amax(dim=1, keepdim=True)).any():
        raise DataError(f"{model}: the logits are not a product of hidden state and output layer")
    return weight.cpu()


def find_model_folder(model: Path | str) -> Path:
    """The folder of a model: itself, or where `embedded` or one of the Hugging Face hub is.

    Raises:
        ValueError: there is no such model.
    """
    folder = Path(model)
    return folder if folder.is_dir() else find_language_model(str(model)).folder


class _Exchange:
    """Takes what enters the output layer, or puts something else there; a forward pre-hook.

    Attributes:
        given: enters instead; None: one position enters, whose logits nobody reads.
        entering: what came; None where nothing has.
    """

    given: torch.Tensor | None = None
    entering: torch.Tensor | None = None

    def begin(self, given: torch.Tensor | None) -> None:
        self.given, self.entering = given, None

    def __call__(self, _layer: nn.Module, arguments: tuple[torch.Tensor]) -> torch.Tensor:
        (entering,) = arguments
        self.entering = entering
        return entering[:, :1] if self.given is None else self.given


class _Given(nn.Module):
    """Stands where a causal LM's transformer was, and returns what it is told."""

    output: Any

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.output
