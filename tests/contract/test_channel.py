"""The way of the decisions from the sampler to the API process. No engine is started."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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

from adaptive_head.decision import NOT_SET, Decision, DecisionFlag
from adaptive_head.slots import ORDINARY
from adaptive_head.vllm.wire import (
    DecisionLists,
    DecisionReader,
    DecisionSender,
    DecisionTensors,
    pack_decisions,
    take_decisions,
)
from tests.contract.helpers import assert_in_order, source


def test_v2_output_copies_and_converts_choices_like_masks():
    """`DecisionTensors` is not of vLLM's type: these two calls are all that is made of it."""
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


def column(*temperatures: int) -> torch.Tensor:
    return torch.tensor(temperatures, dtype=torch.int32).unsqueeze(1)


def test_decisions_go_through_v2s_conversion():
    tensors = DecisionTensors(column(700_000, ORDINARY, 0))
    lists = tensors.to_cpu_nonblocking().tolists(np.array([1, 1, 1]))
    assert isinstance(lists, DecisionLists)
    assert [lists.get(row, 1) for row in range(3)] == [[(700_000,)], None, [(0,)]]


@pytest.mark.parametrize("num_fields", range(1, 5))
def test_a_step_sends_as_many_fields_as_it_has(num_fields):
    expected = [
        Decision(*decision[:num_fields])
        for decision in (Decision(5, 1, 3, DecisionFlag.ABSTAINED), Decision(6))
    ]
    fields = torch.tensor(expected, dtype=torch.int32)[:, :num_fields]
    lists = DecisionTensors(fields).to_cpu_nonblocking().tolists()
    for copied in (lists, pickle.loads(pickle.dumps(lists))):
        sender = DecisionSender().begin_step(copied, ["a", "b"])
        masks = [sender.slice_request(row, 1).to_nested_list() for row in range(2)]
        # Nothing but a temperature is what a decision without the other fields is.
        assert masks == [[[0, *expected[0][:num_fields]]], [[0, 6]]]
        assert [read((1, mask)) for mask in masks] == [[(found, 1)] for found in expected]


def test_a_request_with_drafts_hands_over_as_many_choices_as_it_kept_tokens():
    """Three rows for the first request, one for the second, two for the third."""
    temperatures, starts = column(5, 6, 7, ORDINARY, 8, 9), np.array([0, 3, 4, 6])
    lists = DecisionTensors(temperatures, starts).to_cpu_nonblocking().tolists(np.array([2, 1, 1]))
    for copied in (lists, pickle.loads(pickle.dumps(lists))):
        kept = [copied.get(0, 2), copied.get(1, 1), copied.get(2, 1)]
        assert kept == [[(5,), (6,)], None, [(8,)]]
        sender = DecisionSender().begin_step(copied, ["a", "b", "c"])
        assert sender.slice_request(0, 2).to_nested_list() == [[0, 5], [1, 6]]
        assert sender.slice_request(1, 1) is None
        assert sender.slice_request(2, 1).to_nested_list() == [[0, 8]]


def test_a_step_whose_heads_may_abstain_sends_flags_of_those_that_have():
    micros = torch.tensor([700_000, 300_000, ORDINARY], dtype=torch.int32)
    packed = pack_decisions(micros, torch.tensor([True, False, False]))
    assert packed.dtype == torch.int32
    lists = DecisionTensors(packed).to_cpu_nonblocking().tolists()
    sender = DecisionSender().begin_step(lists, ["a", "b", "c"])
    masks = [sender.slice_request(row, 1) for row in range(3)]
    assert read((1, masks[0].to_nested_list())) == [
        (Decision(700_000, flags=DecisionFlag.ABSTAINED), 1)
    ]
    assert read((1, masks[1].to_nested_list())) == [(Decision(300_000), 1)]
    assert masks[2] is None
    # In a step of narrower rows the same decision is no news.
    plain = DecisionTensors(pack_decisions(micros, None)).to_cpu_nonblocking().tolists()
    assert sender.begin_step(plain, ["a", "b", "c"]).slice_request(1, 1) is None


def record(position: int, temperature: int, **others: int) -> list[int]:
    """What is sent of a decision that differs from the one before."""
    return [position, *Decision(temperature, **others)]


def test_a_record_has_the_position_and_then_every_field():
    """What leaves the engine core and what the API process reads may be of two processes."""
    assert record(3, 700_000) == [3, 700_000, -1, -1, 0]
    assert record(0, 1, top_p=2, min_p=3, flags=DecisionFlag.ABSTAINED) == [0, 1, 2, 3, 1]


def send(*steps):
    """What arrives in the API process of steps with these decisions of one request."""
    sender, encoder = DecisionSender(), MsgpackEncoder()
    masks = [sender.send("a", [make_decision(value) for value in step]) for step in steps]
    decode = MsgpackDecoder(SamplingMaskLists | None).decode
    return [decode(encoder.encode(mask)) for mask in masks]


def make_decision(value) -> Decision:
    return value if isinstance(value, Decision) else Decision(value)


def test_a_choice_is_sent_where_it_changes_with_its_position():
    masks = send([5], [5], [5, 6, 6], [6, 6], [6, 5])
    nested = [mask and mask.to_nested_list() for mask in masks]
    assert nested == [[record(0, 5)], None, [[], record(3, 6), []], None, [[], record(8, 5)]]


@pytest.mark.parametrize("field", Decision._fields)
def test_a_change_of_any_field_is_sent(field):
    first = Decision(5, 6, 7, 0)
    changed = first._replace(**{field: 1})
    masks = send([first], [first], [changed], [changed], [first])
    nested = [mask and mask.to_nested_list() for mask in masks]
    assert nested == [[[0, *first]], None, [[2, *changed]], None, [[4, *first]]]


def test_a_stop_string_in_the_middle_of_a_steps_tokens_takes_their_choices_along():
    (mask,) = send([5, 5, 6])
    assert mask.slice_request(0, 2).to_nested_list() == [record(0, 5), []]
    assert mask.slice_request(0, 1).to_nested_list() == [record(0, 5)]
    _, mask = send([5], [5, 6])
    assert mask.slice_request(0, 1).to_nested_list() == [[]]


def test_a_request_that_has_ended_is_forgotten():
    sender = DecisionSender()
    for request_id in ("a", "b"):
        sender.send(request_id, [Decision(5)])
    sender.forget({"a", "never seen"})
    assert sender.send("a", [Decision(5)]).to_nested_list() == [record(0, 5)]
    assert sender.send("b", [Decision(5)]) is None


def read(*outputs):
    """What the reader makes of outputs: (tokens, mask's entries or None) each."""
    reader, runs = DecisionReader(), []
    for num_tokens, entries in outputs:
        output = completion([0] * num_tokens, None)
        output.sampling_mask = entries and SamplingMask(entries)
        runs += reader.read(output)
        assert output.sampling_mask is None
    return runs


def test_a_token_without_a_choice_has_the_one_before():
    outputs = (1, [record(0, 5)]), (2, None), (4, [[], record(4, 6), record(5, 5), []])
    expected = [(5, 1), (5, 2), (5, 1), (6, 1), (5, 2)]
    assert read(*outputs) == [(Decision(micro), count) for micro, count in expected]
    assert read((0, None)) == []


@pytest.mark.parametrize(
    "outputs",
    [
        [(1, None)],
        [(2, [record(1, 5)])],
        [(1, [record(1, 5)])],
        [(2, [record(0, 5), record(2, 6)])],
        [(3, [record(0, 5), record(2, 6), record(1, 7)])],
        [(1, [[*record(0, 5), 0]])],
        [(1, [[0]])],
    ],
)
def test_choices_that_do_not_fit_their_tokens_are_a_bug_that_shows(outputs):
    with pytest.raises(AssertionError):
        read(*outputs)


def test_what_is_wrong_is_told_once():
    reader = DecisionReader()
    with pytest.raises(AssertionError):
        reader.read(completion([1], None))
    assert reader.read(completion([], None)) == []


def test_an_answer_that_begins_again_begins_at_position_0():
    reader = DecisionReader()
    assert reader.read(completion([1, 2], [record(0, 5)])) == [(Decision(5), 2)]
    reader.restart()
    assert reader.read(completion([3], [record(0, 5)])) == [(Decision(5), 1)]
    reader.restart()
    with pytest.raises(AssertionError):
        reader.read(completion([4], None))


DECISIONS = st.builds(
    Decision,
    st.sampled_from([0, 1, 700_000, 10_000_000]),
    st.sampled_from([NOT_SET, 900_000]),
    st.sampled_from([NOT_SET, 0, 100_000]),
    st.integers(0, 1),
)


@given(
    steps=st.lists(st.lists(DECISIONS, min_size=1, max_size=4), max_size=8),
    data=st.data(),
)
def test_the_reader_returns_what_the_sampler_decided(steps, data):
    """Whatever the steps, and whatever outputs they are merged into."""
    reader, taken = DecisionReader(), []
    outputs = [
        completion([0] * len(step), mask and mask.to_nested_list())
        for step, mask in zip(steps, send(*steps), strict=True)
    ]
    while outputs:
        num_merged = data.draw(st.integers(1, len(outputs)))
        merged = request_output(outputs[0])
        for output in outputs[1:num_merged]:
            merged.add(request_output(output), aggregate=True)
        del outputs[:num_merged]
        taken += reader.read(merged.outputs[0])
    assert [decision for decision, count in taken for _ in range(count)] == [
        decision for step in steps for decision in step
    ]


def test_model_runner_output_has_a_place_for_choices():
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    assert output.sampling_masks is None
    output.sampling_masks = DecisionLists(np.array([[5]], dtype=np.int32))
    copied = pickle.loads(pickle.dumps(output)).sampling_masks
    assert copied.get(0, 1) == [(5,)], "workers send it by pickle"


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
    lists = DecisionLists(column(ORDINARY, 1_234_567, 2_147_483_647, 0).numpy())
    sender = DecisionSender().begin_step(lists, ["0", "1", "2", "3"])
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
        [[0, 1_234_567]],
        [[0, 2_147_483_647]],
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


def completion(token_ids, entries, index=0) -> CompletionOutput:
    mask = None if entries is None else SamplingMask(entries)
    return CompletionOutput(index, "", token_ids, None, None, sampling_mask=mask)


def request_output(*completions, finished=False) -> RequestOutput:
    return RequestOutput("r", None, [1], None, list(completions), finished)


def test_outputs_that_wait_for_a_reader_are_merged_with_their_choices():
    """A slow client gets several tokens in one output."""
    first, second = completion([4], [record(0, 10)]), completion([5], [record(0, 11)], index=1)
    output = request_output(first, second)
    last = request_output(completion([7], [record(1, 13)], index=1), finished=True)
    output.add(request_output(completion([6], None)), aggregate=True)
    output.add(request_output(completion([6], [record(2, 12)])), aggregate=True)
    output.add(last, aggregate=True)
    assert [take_decisions(answer) for answer in output.outputs] == [
        [Decision(10), Decision(10), Decision(12)],
        [Decision(11), Decision(13)],
    ]
    assert [answer.sampling_mask for answer in output.outputs] == [None, None]
    assert take_decisions(output.outputs[0]) is None
    assert output.finished
