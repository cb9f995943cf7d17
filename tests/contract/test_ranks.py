"""What ranks that sample together assume of vLLM, and that they come to one choice. No engine;
`tests/engine/test_ranks.py` has engines of two ranks."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import ParallelConfig
from vllm.device_allocator.sleep_mode_backend import CuMemBackend
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import ncclDataTypeEnum
from vllm.distributed.elastic_ep.elastic_execute import ElasticEPScalingExecutor
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu.pcp_manager import PCPManager
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu_worker import Worker

from adaptive_head import AdaptiveHead, HeadConfig, save_head
from adaptive_head.checkpoint import BaseModelIdentity, HeadError
from adaptive_head.vllm import LOADING, heads, ranks, worker
from adaptive_head.vllm.heads import HeadLoader
from adaptive_head.vllm.ranks import adopt_choices, count_ranks, gather_states
from tests.contract.helpers import assert_in_order, assert_parameters, options_of, params_of, source
from tests.contract.test_v2 import make_stage

# --- one choice ----------------------------------------------------------------------------------


class Group:
    """Threads in the place of ranks, and lists in that of a network."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.places = [None] * world_size
        self.barrier = threading.Barrier(world_size)

    def exchange(self, rank, thing) -> list:
        self.places[rank] = thing
        self.barrier.wait(30)
        found = list(self.places)
        self.barrier.wait(30)
        return found


class Member:
    def __init__(self, group: Group, rank: int) -> None:
        self.world_size = group.world_size
        self.device_communicator = None
        self.cpu_group = self
        self.exchange = lambda thing: group.exchange(rank, thing)

    def broadcast(self, tensor, src):
        tensor.copy_(self.exchange(tensor.clone())[src])


def run_ranks(monkeypatch, tensor_size, context_size, function) -> list:
    """What `function` returns on each rank of a grid, tensor parallel within context parallel."""
    here = threading.local()
    monkeypatch.setattr(ranks, "get_tp_group", lambda: here.tensor)
    monkeypatch.setattr(ranks, "get_pcp_group", lambda: here.context)

    def all_gather_object(found, thing, group):
        found[:] = group.exchange(thing)

    monkeypatch.setattr(ranks.torch.distributed, "all_gather_object", all_gather_object)
    tensor_groups = [Group(tensor_size) for _ in range(context_size)]
    context_groups = [Group(context_size) for _ in range(tensor_size)]
    results = {}

    def run(context, tensor):
        here.tensor = Member(tensor_groups[context], tensor)
        here.context = Member(context_groups[tensor], context)
        rank = context * tensor_size + tensor
        results[rank] = function(rank)

    threads = [
        threading.Thread(target=run, args=(context, tensor), daemon=True)
        for context in range(context_size)
        for tensor in range(tensor_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(tensor_size * context_size)]


@pytest.mark.parametrize(("tensor_size", "context_size"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_all_ranks_adopt_the_first_ones_choices(monkeypatch, tensor_size, context_size):
    def choose(rank):
        micros = torch.arange(6, dtype=torch.int32) + 100 * rank
        # A part of a step's rows, as vLLM verifies large batches of drafts.
        adopt_choices(micros[2:4])
        return count_ranks(), micros.tolist(), gather_states(rank)

    num_ranks = tensor_size * context_size
    results = run_ranks(monkeypatch, tensor_size, context_size, choose)
    for rank, (count, micros, states) in enumerate(results):
        own = 100 * rank
        assert micros == [own, own + 1, 2, 3, own + 4, own + 5]
        assert count == num_ranks and states == list(range(num_ranks))


@pytest.mark.parametrize("nccl", [None, SimpleNamespace(disabled=True), SimpleNamespace()])
def test_choices_go_by_vllms_own_communicator_where_there_is_one(monkeypatch, nccl):
    """torch's would be opened at the first adaptive request, in memory that the KV cache has."""
    log = []
    if nccl is not None and not hasattr(nccl, "disabled"):
        nccl.disabled = False
        nccl.broadcast = lambda tensor, src: log.append(("nccl", tensor, src))
    communicator = None if nccl is None else SimpleNamespace(pynccl_comm=nccl)
    group = SimpleNamespace(
        world_size=2,
        device_communicator=communicator,
        broadcast=lambda tensor, src: log.append(("torch", tensor, src)),
    )
    monkeypatch.setattr(ranks, "get_tp_group", lambda: group)
    monkeypatch.setattr(ranks, "get_pcp_group", lambda: SimpleNamespace(world_size=1))
    micros = torch.ones(3, dtype=torch.int32)
    adopt_choices(micros)
    is_ours = nccl is not None and not nccl.disabled
    ((way, tensor, src),) = log
    assert (way, src) == ("nccl" if is_ours else "torch", 0) and tensor is micros


def test_vllms_communicator_broadcasts_integers_in_place_on_the_current_stream():
    assert_parameters(PyNcclCommunicator.broadcast, "self", "tensor", "src", "stream")
    assert_in_order(
        PyNcclCommunicator.broadcast,
        "stream = current_stream()",
        "recvbuff = buffer_type(tensor.data_ptr())",
        "ncclBroadcast(",
    )
    assert ncclDataTypeEnum.supports_torch_dtype(torch.int32)
    assert "self.disabled" in source(PyNcclCommunicator.__init__)
    assert "self.pynccl_comm" in source(CudaCommunicator.__init__)
    # What sleep suspends and a checkpoint of the process prepares are these, and not torch's.
    assert "group.device_communicator" in source(parallel_state._apply_to_device_comms)


def test_the_broadcast_goes_to_all_ranks_that_sample():
    assert_parameters(GroupCoordinator.broadcast, "self", "input_", "src")
    assert "returninput_" in source(GroupCoordinator.broadcast)
    for name in ("world_size", "cpu_group", "device_communicator"):
        assert f"self.{name}" in source(GroupCoordinator.__init__)


def test_context_parallel_ranks_all_sample_the_whole_batch():
    """Each from the gathered hidden states; ranks of an earlier pipeline stage sample nothing."""
    assert_in_order(
        v2.GPUModelRunner.sample_tokens,
        "if not self.is_last_pp_rank:",
        "self.pp_handler.receive(",
        "self.pcp_manager.restore_for_sampling(",
        "self.sample(",
    )
    assert_in_order(
        PCPManager.restore_for_sampling, "self.restore_hidden_states(", "self._global_batch"
    )
    assert_in_order(PCPManager.restore_hidden_states, "get_pcp_group().all_gather(")


# --- seeds ---------------------------------------------------------------------------------------


def test_vllm_has_drawn_a_requests_seed_when_ours_is_asked():
    assert_in_order(
        Sampler.add_request, "self.sampling_states.add_request(", "processor.add_request("
    )
    assert_in_order(SamplingStates.add_request, "np.random.randint(", "self.seeds.np[req_idx] =")


def test_an_unseeded_request_leaves_vllms_stream_of_seeds_alone():
    """All ranks draw from it, each for itself: a number more on one of them, and they would sample
    different tokens for every later request without a seed."""
    stage = make_stage()
    np.random.seed(3)
    before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
    stage.add_request(2, params_of(options_of(policy="constant", constant={"temperature": 1})))
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before
    assert stage.selector._seeds_np[2] == 2


# --- a head that comes later ---------------------------------------------------------------------


class Table:
    def __init__(self) -> None:
        self.heads = set()

    def add_head(self, name, generation, network):
        self.heads.add((name, generation))

    def remove_head(self, name, generation):
        self.heads.discard((name, generation))


@pytest.fixture
def head(tmp_path) -> tuple[Path, str]:
    """A head's folder and digest."""
    network = AdaptiveHead(HeadConfig(8, (0.0, 0.5), (4,)))
    identity = BaseModelIdentity(name="tiny", fingerprint=None)
    save_head(tmp_path / "h", network, level="token", base_model=identity, trained=False)
    return tmp_path / "h", heads.load_head(tmp_path / "h").digest


@pytest.fixture
def loader(head) -> HeadLoader:
    model_config = SimpleNamespace(get_hidden_size=lambda: 8, model="tiny")
    config = {"adaptive": {"verify_base": False}}
    return HeadLoader(SimpleNamespace(model_config=model_config, additional_config=config))


@pytest.mark.parametrize(
    ("other", "result", "is_in"),
    [
        ([None, None], None, True),
        ([LOADING, None, None], None, True),
        (["no file"], "no file", False),
        ([LOADING, "no file"], "no file", False),
        ([None, "no memory"], "no memory", False),
    ],
)
def test_a_head_enters_where_every_rank_has_it_and_nowhere_else(
    monkeypatch, loader, head, other, result, is_in
):
    """Another rank's states, in the order in which the two exchange them."""
    table, states = Table(), []

    def gather(state):
        # This rank may still be reading, which the other one would wait for.
        states.append(other.pop(0) if state != LOADING else None)
        assert states[-1] != LOADING or not table.heads
        return [state, states[-1]]

    monkeypatch.setattr(heads, "gather_states", gather)
    while (found := loader.enter(table, ("h", 1), *head)) == LOADING:
        assert not table.heads, "it serves on this rank alone"
    assert found == result and not other
    assert table.heads == ({("h", 1)} if is_in else set())


def test_a_head_that_this_rank_cannot_enter_is_gone_again(monkeypatch, loader, head):
    monkeypatch.setattr(heads, "gather_states", lambda state: [state, None])
    table = Table()
    monkeypatch.setattr(table, "add_head", lambda *_: 1 / 0)
    while (found := loader.enter(table, ("h", 1), *head)) == LOADING:
        pass
    assert found == "division by zero" and not table.heads and not loader._loading


@pytest.mark.parametrize("other", [{"h": "another digest"}, {}, {"h": None, "more": "digest"}])
def test_heads_that_are_not_the_same_on_all_ranks_are_refused(monkeypatch, head, other):
    folder, digest = head
    settings = {"adaptive": {"heads": {"h": str(folder)}, "verify_base": False}}
    model_config = SimpleNamespace(get_hidden_size=lambda: 8, model="tiny")
    config = SimpleNamespace(model_config=model_config, additional_config=settings)
    monkeypatch.setattr(heads, "gather_states", lambda state: [state, state])
    assert list(heads.load_heads(config)) == ["h"]
    same = {"h": digest} if "more" in other else {}
    monkeypatch.setattr(heads, "gather_states", lambda state: [state, other | same])
    with pytest.raises(HeadError, match=r"head (h|more) is not the same on all ranks"):
        heads.load_heads(config)


# --- sleep, wake, reload -------------------------------------------------------------------------


def test_heads_are_loaded_once_vllms_pool_of_weights_is_closed(monkeypatch):
    """Also by a worker that joins a running server, whose weights come from another one."""
    log = []
    monkeypatch.setattr(
        worker.PlatformWorker, "load_model", lambda self, **kwargs: log.append(kwargs)
    )
    monkeypatch.setattr(worker, "load_heads", lambda config: f"heads of {config}")
    made = object.__new__(worker.AdaptiveWorker)
    made.vllm_config = "config"
    made.model_runner = SimpleNamespace(load_heads=log.append)
    for is_last in (True, False):
        group = SimpleNamespace(is_last_rank=is_last)
        monkeypatch.setattr(worker, "get_pp_group", lambda group=group: group)
        made.load_model(load_dummy_weights=True)
    dummy = {"load_dummy_weights": True}
    assert log == [dummy, "heads of config", dummy]
    assert "load_model(load_dummy_weights=True)" in source(ElasticEPScalingExecutor.load_model)


def test_sleep_and_reload_touch_vllms_pools_and_the_model_only():
    """Heads, their graphs and the slots are in neither."""
    assert_in_order(Worker.sleep, "model.named_buffers()", "self.sleep_mode_backend.suspend(level)")
    assert_in_order(CuMemBackend.suspend, "allocator.sleep(offload_tags=offload_tags)")
    assert_in_order(CuMemBackend.resume, "allocator.wake_up(tags)")
    # A request that waits meanwhile is preempted: its keys and values are gone.
    assert_in_order(EngineCore._finish_pause, "if clear_cache:", "self._reset_caches()")
    assert "reset_running_requests:bool=True" in source(EngineCore._reset_caches)
    assert_in_order(Worker.reload_weights, "self.model_runner.reload_weights(")
    assert_in_order(v2.GPUModelRunner.reload_weights, "model = self.get_model()", "reload_weights(")
    assert "self.sampler" not in source(v2.GPUModelRunner.reload_weights)
    pools = source(Worker).split("_maybe_get_memory_pool_context(")[1:]
    tags = {text.split(")")[0] for text in pools if not text.startswith("self,")}
    assert tags == {'"workspace"', 'tag="weights"', 'tag="kv_cache"', 'tag="runtime"'}


def test_engines_may_join_a_running_server_with_one_option_only():
    assert "enable_elastic_ep" in ParallelConfig.__dataclass_fields__
