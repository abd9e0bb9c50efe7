"""The rail and the node of a rank: smaller groups inside a group, and the memory of all three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ep_runtime.memory import MemorySizes, RankMemory
from ep_runtime.memory.nvshmem import load_nvshmem, symmetric_region
from ep_runtime.native import _C
from ep_runtime.normal.config import NormalConfig
from ep_runtime.normal.heap import HeapSizes
from ep_runtime.normal.node_shape import NodeShape
from ep_runtime.normal.nodes import NodePath
from ep_runtime.normal.rails import MappedRails, NodePart, Rails, WiredRail
from ep_runtime.normal.rank import Provider
from ep_runtime.normal.steps import NormalSteps
from ep_runtime.normal.tuned import TunedSms
from ep_runtime.normal.wire import CudaPuts, NvshmemPuts, Puts, RegionShape, WiredRails
from ep_runtime.world import World

# This rank's memory among a world's, which all map. Collective.
Memory = Callable[[World, MemorySizes], RankMemory]


def data_sizes(num_bytes: int) -> MemorySizes:
    """A data heap has no local words and no fault record: the control heap's are used."""
    return MemorySizes(num_bytes, 1, 1)


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part of a rank's group.

    members       its ranks' numbers in the whole group
    part          where its words lie, and what records call its ranks
    local_offset  of its own words, in bytes
    config        its sizes
    """

    members: list[int]
    part: _C.NormalPart
    local_offset: int
    config: NormalConfig


@dataclass(frozen=True, slots=True)
class NodePlan:
    """The parts of one rank.

    sizes     of the control memory that they and the whole group share
    counters  bytes into this rank's own words: what it counts of puts
    """

    rail: PartPlan
    node: PartPlan
    sizes: MemorySizes
    counters: int


def plan_nodes(config: NormalConfig, shape: NodeShape) -> NodePlan:
    """Layouts of a group whose config has validate_for() behind it, and is layered."""
    whole = _C.normal_layout(shape.num_nodes * shape.ranks_per_node, config.max_experts)
    local = whole["local_bytes"]
    rail_config = replace(config, pool_bytes=0, ranks_per_node=None, between_nodes="auto")
    node_config = replace(
        config,
        max_tokens=shape.num_nodes * config.max_tokens,
        ranks_per_node=None,
        between_nodes="auto",
    )
    rail_start = whole["control_bytes"]
    node_start = _control_end(shape.num_nodes, config, rail_start)
    end = _control_end(shape.ranks_per_node, config, node_start)
    rail = PartPlan(
        shape.rail_members,
        _C.NormalPart(1, rail_start, shape.local, shape.ranks_per_node),
        local,
        rail_config,
    )
    first = shape.node * shape.ranks_per_node
    node = PartPlan(
        shape.node_members, _C.NormalPart(2, node_start, first, 1), 2 * local, node_config
    )
    counters = _region_shape(config, shape).offsets()["counters"]
    sizes = MemorySizes(end, 3 * local + counters, _C.fault_bytes())
    return NodePlan(rail, node, sizes, 3 * local)


@dataclass(frozen=True, slots=True)
class Ground:
    """Memory of a rank whose group is layered.

    control  of the whole group, and of its parts
    data     of the whole group, which sends no rows
    regions  of all ranks, where rows cross by puts; 0 where this rank does not map them
    """

    control: RankMemory
    data: RankMemory
    regions: list[int] | None


def prepare_ground(
    config: NormalConfig, world: World, device: torch.device, memory: Memory
) -> Ground:
    """Collective; raises on every rank."""
    shape = NodeShape.of(config, world.num_ranks, world.rank)
    sizes = plan_nodes(config, shape).sizes
    if not config.wired:
        data_bytes = config.heap_sizes(world.num_ranks).total
        return Ground(memory(world, sizes), memory(world, data_sizes(data_bytes)), None)
    # Words of ranks on other nodes are out of reach: what is written there goes nowhere.
    node = memory(world.part(shape.node_members), sizes)
    nowhere = _own_memory(sizes.heap, device)
    heaps = [nowhere.address] * world.num_ranks
    for member, heap in zip(shape.node_members, node.heaps, strict=True):
        heaps[member] = heap
    num_bytes = _region_shape(config, shape).offsets()["bytes"]
    if config.between_nodes == "nvshmem":
        region = symmetric_region(world, num_bytes, device.index)
    else:
        region = memory(world, data_sizes(num_bytes))
    control = RankMemory(
        node.kind,
        heaps,
        node.local,
        node.fault,
        mappings=[*node.mappings, *region.mappings],
        owned=[*node.owned, *region.owned, nowhere],
    )
    data = RankMemory(node.kind, [nowhere.address] * world.num_ranks, 0, 0)
    return Ground(control, data, region.heaps)


def join_nodes(
    whole: NormalSteps, ground: Ground, memory: Memory
) -> tuple[NodePath, tuple[NodePart, NodePart]]:
    """A rank's ends of its rail and its node. Collective; raises on this rank."""
    config, world = whole.config, whole.world
    if whole.device.type == "cuda":
        _C.load_node_kernels(whole.device.index)
    shape = NodeShape.of(config, world.num_ranks, world.rank)
    plan = plan_nodes(config, shape)
    rails: Rails
    if ground.regions is None:
        rail = _make_part(NodePart(), plan.rail, whole, _provider(memory, world, plan.rail))
        rails = MappedRails(whole, rail)
    else:
        rails = _wired_rails(whole, plan, shape, ground)
    node = _make_part(NodePart(), plan.node, whole, _provider(memory, world, plan.node))
    return NodePath(shape, whole, rails, node), (rails.part, node)


def _wired_rails(
    whole: NormalSteps, plan: NodePlan, shape: NodeShape, ground: Ground
) -> WiredRails:
    assert ground.regions is not None
    region = _region_shape(whole.config, shape)
    at = region.offsets()
    sizes = HeapSizes(at["inbox"], at["mirrors"] - at["inbox"], at["data_bytes"] - at["mirrors"])
    own = ground.regions[shape.rank] + at["data"]
    data = RankMemory(ground.control.kind, [own] * shape.num_nodes, 0, 0)
    rail = WiredRail()
    _make_part(rail, plan.rail, whole, lambda _num_bytes: data, sizes)
    counters = ground.control.local + plan.counters
    arguments = (whole._ops.native, rail._ops.native, *region.native, ground.regions, counters)
    puts: Puts
    if whole.device.type == "cpu":
        puts = _C.HostWire(*arguments)  # type: ignore[arg-type]
    else:
        native = _C.CudaWire(*arguments, whole.device.index)  # type: ignore[arg-type]
        if whole.config.between_nodes == "nvshmem":
            puts = NvshmemPuts(native, whole.device, load_nvshmem(), region)
        else:
            puts = CudaPuts(native, whole.device)
    return WiredRails(whole, rail, region, puts)


def _make_part(
    part: NodePart,
    plan: PartPlan,
    whole: NormalSteps,
    provider: Provider,
    sizes: HeapSizes | None = None,
) -> NodePart:
    control = whole._control
    words = RankMemory(
        kind=control.kind,
        heaps=[control.heaps[member] for member in plan.members],
        local=control.local + plan.local_offset,
        fault=control.fault,
    )
    world = whole.world.part(plan.members)
    sizes = plan.config.heap_sizes(world.num_ranks) if sizes is None else sizes
    part._assemble(
        plan.config,
        world,
        whole.device,
        words,
        provider(sizes.total),
        provider,
        TunedSms(whole.num_sms.dispatch, whole.num_sms.combine),
        whole.max_sms,
        plan.part,
        sizes,
    )
    part.stats = whole.stats
    return part


def _provider(memory: Memory, world: World, plan: PartPlan) -> Provider:
    part = world.part(plan.members)
    return lambda num_bytes: memory(part, data_sizes(num_bytes))


def _own_memory(num_bytes: int, device: torch.device) -> _C.HostMemory | _C.DeviceMemory:
    if device.type == "cpu":
        return _C.HostMemory(num_bytes)
    return _C.DeviceMemory(num_bytes, device.index)


def _region_shape(config: NormalConfig, shape: NodeShape) -> RegionShape:
    return RegionShape(
        shape.num_nodes,
        shape.ranks_per_node,
        shape.rank,
        config.max_experts,
        config.max_tokens,
        config.max_hidden,
        config.max_topk,
    )


def _control_end(num_ranks: int, config: NormalConfig, start: int) -> int:
    return _C.normal_layout(num_ranks, config.max_experts, start)["control_bytes"]
