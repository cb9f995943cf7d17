"""The way of the choices from the sampler to the API process. No engine is started."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from vllm.outputs import CompletionOutput, RequestOutput, SamplingMask
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.outputs import ModelRunnerOutput, SamplingMaskLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.sample.output import SamplerOutput, SamplingMaskTensors

from adaptive_head.slots import ORDINARY
from adaptive_head.vllm.choices import (
    ChoiceLists,
    ChoiceReader,
    ChoiceSender,
    ChoiceTensors,
    take_choices,
)
from tests.contract.helpers import assert_in_order, source


def test_v2_output_copies_and_converts_choices_like_masks():
    """`ChoiceTensors` is not of vLLM's type: these two calls are all that is made of it."""
    init, get = source(AsyncOutput.__init__), source(AsyncOutput.get_output)
    assert "sampler_output.sampling_mask_tensors.to_cpu_nonblocking()" in init
    assert "self.sampling_mask_tensors.tolists(self.num_sampled_tokens_np)" in get
    assert "self.model_runner_output.sampling_masks=" in get
    # The device tensor lives on another stream until the copy is done.
    assert "self.sampler_output=sampler_output" in init
    uses = (init + get).count("sampling_mask_tensors")
    assert uses == 6, "vLLM makes another use of the tensors"
    assert {"to_cpu_nonblocking", "tolists"} <= set(dir(SamplingMaskTensors))


def test_v2_sampler_output_has_a_place_for_choices():
    names = [field.name for field in dataclasses.fields(SamplerOutput)]
    assert "sampling_mask_tensors" in names
    assert not SamplerOutput.__dataclass_params__.frozen
    assert_in_order(v2.GPUModelRunner.sample, "return sampler_output, ")
    assert_in_order(
        v2.GPUModelRunner.sample_tokens,
        "= self.sample(",
        "AsyncOutput(",
        "sampler_output=sampler_output",
    )


def test_choices_go_through_v2s_conversion():
    choices = ChoiceTensors(torch.tensor([700_000, ORDINARY, 0], dtype=torch.int32))
    lists = choices.to_cpu_nonblocking().tolists(np.array([1, 1, 1]))
    assert isinstance(lists, ChoiceLists)
    assert [lists.get(row, 1) for row in range(3)] == [[700_000], None, [0]]


def test_a_request_with_drafts_hands_over_as_many_choices_as_it_kept_tokens():
    """Three rows for the first request, one for the second, two for the third."""
    micros = torch.tensor([5, 6, 7, ORDINARY, 8, 9], dtype=torch.int32)
    tensors = ChoiceTensors(micros, np.array([0, 3, 4, 6]))
    lists = tensors.to_cpu_nonblocking().tolists(np.array([2, 1, 1]))
    for copied in (lists, pickle.loads(pickle.dumps(lists))):
        assert [copied.get(0, 2), copied.get(1, 1), copied.get(2, 1)] == [[5, 6], None, [8]]
        sender = ChoiceSender().begin_step(copied, ["a", "b", "c"])
        assert sender.slice_request(0, 2).to_nested_list() == [[5, 0], [6, 1]]
        assert sender.slice_request(1, 1) is None
        assert sender.slice_request(2, 1).to_nested_list() == [[8, 0]]


def send(*micros):
    """What arrives in the API process of steps with these choices of one request."""
    sender, encoder = ChoiceSender(), MsgpackEncoder()
    masks = [sender.send("a", list(step)) for step in micros]
    decode = MsgpackDecoder(SamplingMaskLists | None).decode
    return [decode(encoder.encode(mask)) for mask in masks]


def test_a_choice_is_sent_where_it_changes_with_its_position():
    masks = send([5], [5], [5, 6, 6], [6, 6], [6, 5])
    nested = [mask and mask.to_nested_list() for mask in masks]
    assert nested == [[[5, 0]], None, [[], [6, 3], []], None, [[], [5, 8]]]


def test_a_stop_string_in_the_middle_of_a_steps_tokens_takes_their_choices_along():
    (mask,) = send([5, 5, 6])
    assert mask.slice_request(0, 2).to_nested_list() == [[5, 0], []]
    assert mask.slice_request(0, 1).to_nested_list() == [[5, 0]]
    _, mask = send([5], [5, 6])
    assert mask.slice_request(0, 1).to_nested_list() == [[]]


def test_a_request_that_has_ended_is_forgotten():
    sender = ChoiceSender()
    for request_id in ("a", "b"):
        sender.send(request_id, [5])
    sender.forget({"a", "never seen"})
    assert sender.send("a", [5]).to_nested_list() == [[5, 0]]
    assert sender.send("b", [5]) is None


def read(*outputs):
    """What the reader makes of outputs: (tokens, mask's entries or None) each."""
    reader = ChoiceReader()
    for num_tokens, entries in outputs:
        output = completion([0] * num_tokens, None)
        output.sampling_mask = entries and SamplingMask(entries)
        assert reader.read(output) == num_tokens
        assert output.sampling_mask is None
    return reader.take()


def test_a_token_without_a_choice_has_the_one_before():
    assert read((1, [[5, 0]]), (2, None), (4, [[], [6, 4], [5, 5], []])) == [(5, 4), (6, 1), (5, 2)]
    assert read((0, None)) == []


@pytest.mark.parametrize(
    "outputs",
    [
        [(1, None)],
        [(2, [[5, 1]])],
        [(1, [[5, 1]])],
        [(2, [[5, 0], [6, 2]])],
        [(3, [[5, 0], [6, 2], [7, 1]])],
    ],
)
def test_choices_that_do_not_fit_their_tokens_are_a_bug_that_shows(outputs):
    with pytest.raises(AssertionError):
        read(*outputs)


def test_what_is_wrong_is_told_once():
    reader = ChoiceReader()
    reader.read(completion([1], None))
    with pytest.raises(AssertionError):
        reader.take()
    assert reader.take() == []


def test_what_was_taken_is_not_taken_again():
    reader = ChoiceReader()
    reader.read(completion([1, 2], [[5, 0]]))
    assert reader.take() == [(5, 2)] and reader.take() == []
    reader.read(completion([3], None))
    reader.read(completion([4], [[6, 3]]))
    assert reader.take() == [(5, 1), (6, 1)]


def test_model_runner_output_has_a_place_for_choices():
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    assert output.sampling_masks is None
    output.sampling_masks = ChoiceLists(np.array([5], dtype=np.int32))
    copied = pickle.loads(pickle.dumps(output)).sampling_masks
    assert copied.get(0, 1) == [5], "workers send it by pickle"


def test_the_scheduler_slices_by_row_and_forwards_where_its_flag_says():
    """The flag is an attribute that nothing else of the scheduler's reads."""
    assert_in_order(
        Scheduler.update_from_output,
        "req_index = model_runner_output.req_id_to_index[req_id]",
        "should_emit_output = bool(",
        "if self.return_sampling_mask:",
        "if new_token_ids and sampling_masks is not None:",
        "sampling_masks.slice_request(req_index, len(new_token_ids))",
        "new_sampling_mask=new_sampling_mask",
    )
    assert source(Scheduler).count("self.return_sampling_mask") == 2
    assert "return_sampling_mask" not in source(AsyncScheduler)


def test_choices_cross_to_the_api_process_in_vllms_encoding():
    choices = ChoiceLists(np.array([ORDINARY, 1_234_567, 2_147_483_647, 0], dtype=np.int32))
    sender = ChoiceSender().begin_step(choices, ["0", "1", "2", "3"])
    outputs = [
        EngineCoreOutput(
            request_id=str(row),
            new_token_ids=[row],
            new_sampling_mask=sender.slice_request(row, 1),
        )
        for row in range(4)
    ]
    frames = MsgpackEncoder().encode(EngineCoreOutputs(outputs=outputs))
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(frames)
    masks = [output.new_sampling_mask for output in decoded.outputs]
    assert masks[0] is None
    assert all(isinstance(mask, SamplingMaskLists) for mask in masks[1:])
    assert all(mask.token_ids.dtype == np.int32 for mask in masks[1:])
    assert [mask.to_nested_list() for mask in masks[1:]] == [
        [[1_234_567, 0]],
        [[2_147_483_647, 0]],
        [[0, 0]],
    ]


def test_the_output_processor_hands_on_one_entry_a_token():
    assert_in_order(
        OutputProcessor.process_outputs,
        "req_state.sampling_mask_chunks.append(",
        "make_request_output(",
    )
    assert_in_order(
        RequestState._new_completion_output,
        "if (delta or finished) and self.sampling_mask_chunks:",
        "for chunk in self.sampling_mask_chunks",
        "for position in chunk.to_nested_list()",
        "self.sampling_mask_chunks.clear()",
        "sampling_mask=sampling_mask",
    )
    assert_in_order(OutputProcessor._trim_surplus_tokens, "if num_dropped <= 0:", "return")


def completion(token_ids, changes, index=0) -> CompletionOutput:
    mask = None if changes is None else SamplingMask(changes)
    return CompletionOutput(index, "", token_ids, None, None, sampling_mask=mask)


def request_output(*completions, finished=False) -> RequestOutput:
    return RequestOutput("r", None, [1], None, list(completions), finished)


def test_outputs_that_wait_for_a_reader_are_merged_with_their_choices():
    """A slow client gets several tokens in one output."""
    output = request_output(completion([4], [[10, 0]]), completion([5], [[11, 0]], index=1))
    output.add(request_output(completion([6], None)), aggregate=True)
    output.add(request_output(completion([6], [[12, 2]])), aggregate=True)
    output.add(request_output(completion([7], [[13, 1]], index=1), finished=True), aggregate=True)
    assert [take_choices(answer) for answer in output.outputs] == [[10, 10, 12], [11, 13]]
    assert [answer.sampling_mask for answer in output.outputs] == [None, None]
    assert take_choices(output.outputs[0]) is None
    assert output.finished
