"""A V2 worker that says what its rank has sampled, and that can be led to other temperatures."""

import numpy as np
import torch
from v2_worker import AdaptiveWorker
from vllm.distributed import get_tp_group

from adaptive_head.vllm import processor_v2
from adaptive_head.vllm.ranks import adopt_choices


class RankWorker(AdaptiveWorker):
    def load_model(self, **kwargs):
        super().load_model(**kwargs)
        self._steps = []
        sample = self.model_runner.sample

        def noted(*args):
            result = sample(*args)
            output, num_sampled, _ = result
            rows = zip(output.sampled_token_ids.tolist(), num_sampled.tolist(), strict=True)
            decisions = output.sampling_mask_tensors
            micros = decisions and decisions.decisions.flatten().tolist()
            self._steps.append([[tokens[:count] for tokens, count in rows], micros])
            return result

        self.model_runner.sample = noted

    def take_record(self):
        """Tokens and temperatures of every step since the last call, and what slots remember."""
        steps, self._steps = self._steps, []
        selector = self.model_runner.selector
        return {
            "steps": steps,
            "chosen": selector and selector.chosen.nan_to_num(-1.0).tolist(),
            "heads": selector and [head.generation for head in selector.count_choices()],
        }

    def lead_astray(self, is_alone):
        """From now on all ranks but the first see other hidden states, draw by other seeds and
        come to other temperatures; with `is_alone` they keep them."""
        selector, is_first = self.model_runner.selector, get_tp_group().is_first_rank
        begin, add = selector.begin, selector.add
        rng = np.random.default_rng(1)

        def begin_elsewhere(hidden_states, batch):
            return begin(hidden_states + torch.randn_like(hidden_states), batch)

        def add_elsewhere(slot, options, seed):
            return add(slot, options, int(rng.integers(1 << 62)))

        def disagree(micros):
            if not is_first:
                micros.add_((micros >= 0) * 200_000)
            if not is_alone:
                adopt_choices(micros)

        if not is_first:
            selector.begin, selector.add = begin_elsewhere, add_elsewhere
        processor_v2.adopt_choices = disagree
