"""What base_train, mid_train and chat_sft share: continue or begin, train, record."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import checkpoint
from nanochat.chat_data import chat_batches
from nanochat.common import (
    UserError,
    compute_dtype,
    compute_init,
    environment,
    get_dist_info,
    print0,
    save_section,
)
from nanochat.compiling import compile_model
from nanochat.dataloader import prefetch
from nanochat.fp8 import fp8_memory, fp8_works, use_fp8
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import OptimConfig, lr_scale, muon_momentum, setup_optimizer
from nanochat.plan import ChatConfig, check_fits, find_gpu, make_plan
from nanochat.tasks.common import TaskMixture
from nanochat.tasks.customjson import CustomJSON
from nanochat.train import Run, train

IDLE = {
    "device",
    "compile",
    "deterministic",
    "overwrite",
    "eval_every",
    "save_every",
    "keep",
    "dry_run",
    "world",
    "tracker",
}  # no effect on weights
# At these values a field that came later leaves an older run what it was.
LATER = {
    ("grad_clip", 0.0),
    ("dtype", ""),
    ("matrix_method", "newton-schulz"),
    ("fp8", False),
}


def weight_settings(config, idle=IDLE) -> dict:
    "Return the fields that determine the weights."
    fields = dataclasses.asdict(config).items()
    return {k: v for k, v in fields if k not in idle and (k, v) not in LATER}


def optim_config(config) -> OptimConfig:  # of a BaseConfig or ChatConfig
    "Pick the fields that are the optimizer's."
    names = [f.name for f in dataclasses.fields(OptimConfig)]
    fields = dataclasses.asdict(config).items()
    return OptimConfig(**{k: v for k, v in fields if k in names})


def settings_hash(*parts) -> str:
    "Name a run by everything that determines its weights."
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def begin(config) -> torch.device:  # BaseConfig or ChatConfig
    "Choose the device, meet the other ranks, and refuse what this device cannot do."
    if config.deterministic:
        checkpoint.use_deterministic()
    device = compute_init(config.device)
    if config.fp8 and (reason := fp8_works(device)):
        raise UserError(f"--fp8 {reason}: leave --fp8 out")
    return device


def prepare(model, config):  # called like the model
    "Turn on what makes steps fast: fp8 where it was asked for, compiling on GPUs."
    device, wished = model.get_device(), config.compile
    if config.fp8:
        print0(f"fp8: {use_fp8(model)} products of the blocks are done in eight bits")
    called = model
    if wished or (wished is None and device.type == "cuda"):
        called = compile_model(model)
    if config.fp8 and called is model:
        print0("WARNING: fp8 without torch.compile makes training slower, not faster")
    return called


def device_memory(device: torch.device) -> float:  # bytes
    "Return the memory of a GPU, or of the machine."
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return environment()["memory_gib"] * 2**30


def find_resume(folder, name: str, overwrite: bool):
    "Return the newest whole checkpoint of a run and its description, or None twice."
    steps = checkpoint.list_steps(folder)
    if not steps or overwrite:
        return None, None
    for step in reversed(steps):
        path = folder / f"step_{step:06d}"
        try:
            meta = checkpoint.read_meta(path)
        except UserError as error:
            print0(f"WARNING: {error}")
            continue
        if meta.get("settings") != name:
            raise UserError(
                f"{folder} holds a run with other settings: choose another --tag, "
                "or add --overwrite True to replace it"
            )
        return path, meta
    raise UserError(
        f"no checkpoint in {folder} is whole: delete it, or add --overwrite True, to "
        "begin again"
    )


def too_long(cursors: dict, device: torch.device) -> dict[str, int]:
    "Count over all ranks the conversations that were cut or dropped; {} for plain text."
    found = {}
    for what in ("cut", "dropped"):
        if counts := [c[what] for c in cursors.values() if what in c]:
            count = torch.tensor(sum(counts), device=device)
            if dist.is_initialized():
                dist.all_reduce(count)
            found[f"conversations_{what}"] = int(count)
    return found


def run_stage(
    stage: str,  # name of the script
    source: str,  # "base", "mid" or "sft": where the checkpoint goes
    config,  # BaseConfig or ChatConfig
    plan,  # steps, micro-batches
    model,
    tokenizer,
    make_batches,  # function(cursors) -> this rank's batches, for ever
    evaluators: list,  # (every, function() -> dict)
    tag: str,
    parent: str = "",  # hash of the weights that the stage starts from
    warm: Path | None = None,  # checkpoint whose optimizer state a new run begins with
) -> dict:
    "Train one stage, from wherever an interrupted run stopped."
    world, device = get_dist_info()[2], model.get_device()
    model.dtype = compute_dtype(device, config.dtype)
    if config.fp8:
        sizes = plan.device_batch_size, model.dtype.itemsize
        more = fp8_memory(model.config, *sizes)
        plan = dataclasses.replace(plan, memory=plan.memory + more)
    check_fits(plan, device_memory(device))
    chosen = weight_settings(config)
    settings = settings_hash(stage, chosen, tokenizer.fingerprint(), parent)
    folder = checkpoint.checkpoint_folder(source, tag)
    optimizer = setup_optimizer(model, optim_config(config))
    (path, meta), cursors = find_resume(folder, settings, config.overwrite), None
    finished = path is not None and meta["step"] == plan.num_steps
    if finished:
        print0(f"{stage}: already finished, see {path}")
    elif path is not None:
        cursors = checkpoint.load_training_state(path, model, optimizer)
        print0(f"{stage}: continuing from step {meta['step']} of {path}")
    elif warm is not None:
        checkpoint.read_meta(warm, "optimizer*")
        checkpoint.load_optimizer(warm, optimizer)
        print0(f"{stage}: the optimizer begins with the state of {warm}")
    factor, fall = getattr(config, "lr_frac", 1.0), config.warmdown_ratio
    rise, final = getattr(config, "warmup_ratio", 0.0), config.final_lr_frac
    total = plan.num_steps

    def save(step: int, cursors: dict, results: dict) -> Path:
        results |= too_long(cursors, device)
        facts = {
            "stage": stage,
            "settings": settings,
            "config": dataclasses.asdict(config),
            "tokenizer": tokenizer.fingerprint(),
            "results": results,
        }
        state = (model, optimizer, cursors, facts)
        return checkpoint.save(folder, step, *state, config.keep)

    gpu = find_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    run = Run(
        name=stage,
        num_steps=total,
        micro_batches=plan.micro_batches // world,
        lr_scale=lambda step: factor * lr_scale(step, total, rise, fall, final),
        momentum=muon_momentum,
        evaluators=evaluators,
        save=save,
        save_every=config.save_every,
        start=meta["step"] if meta else 0,
        results=meta["results"] if meta else {},
        grad_clip=config.grad_clip,
        trackers=config.tracker,
        settings=dataclasses.asdict(config),
        flops_per_token=model.estimate_flops(),
        peak=gpu.peak if gpu else 0.0,
        saved=path or "none",
    )
    results = run.results
    if not finished:
        called = prepare(model, config)
        results = train(called, optimizer, prefetch(make_batches(cursors)), run)
    facts = {
        "parameters": model.num_params(),
        "steps": total,
        "tokens": total * plan.total_batch_size,
        "flops": total * plan.total_batch_size * float(model.estimate_flops()),
        **{
            k: v
            for k, v in results.items()
            if not isinstance(v, float) or math.isfinite(v)
        },
    }
    save_section(stage, facts)
    return results


def run_chat_stage(
    stage: str,  # name of the script
    sources: tuple[str, str],  # which checkpoint to continue, which to write
    config: ChatConfig,
    tasks: tuple,  # training and validation conversations
    everything: bool,  # learn from every token, not only the assistant's
) -> dict:
    "Continue a model on conversations."
    device, world = begin(config), get_dist_info()[2]
    if config.extra:
        both, epochs = [tasks[0], CustomJSON(config.extra)], [1, config.extra_epochs]
        tasks = TaskMixture(both, epochs=epochs), tasks[1]
    model, tokenizer, meta = checkpoint.load_model(
        sources[0], device, config.source_tag
    )
    model.train()
    B, T = config.device_batch_size, model.config.sequence_len
    steps = config.num_iterations
    if steps < 0:
        steps = max(
            1, count_rows(tokenizer, tasks[0], T) * T // config.total_batch_size
        )
    wide = compute_dtype(device, config.dtype).itemsize
    plan = make_plan(
        model.config,
        B,
        config.total_batch_size,
        steps,
        world_size=world,
        activation_bytes=wide,
        device_type=device.type,
    )
    print0(
        f"{stage}: {len(tasks[0]):,} conversations, {steps} steps from {meta['path']}"
    )

    def stream(task, streams: int, cursors: dict | None = None):
        return chat_batches(
            tokenizer, task, B, T, device, streams, cursors, everything, config.seed
        )

    def validate() -> dict:
        count = max(1, config.eval_tokens // (B * T * world))
        with torch.inference_mode():
            sizes = tokenizer.token_bytes().to(device)
            return {
                "val_bpb": evaluate_bpb(model, stream(tasks[1], world), count, sizes)
            }

    results = run_stage(
        stage,
        sources[1],
        config,
        plan,
        model,
        tokenizer,
        lambda cursors: stream(tasks[0], plan.micro_batches, cursors),
        [(config.eval_every, validate)],
        config.tag or Path(meta["path"]).parent.name,
        meta["sha256"]["model.safetensors"],
        Path(meta["path"]) if config.warm_start else None,
    )
    cut, dropped = (results.get(f"conversations_{k}", 0) for k in ("cut", "dropped"))
    if cut or dropped:
        print0(
            f"{stage}: {cut:,} conversations were cut after an answer and {dropped:,} "
            f"dropped, because they are longer than {T} tokens"
        )
    return results


def count_rows(tokenizer, task, seq_len: int) -> int:
    "Estimate how many packed rows one pass over a task fills, from a sample."
    sample = range(0, len(task), max(1, len(task) // 1000))
    sizes = [
        len(tokenizer.render_conversation(task[i], max_tokens=seq_len + 1)[0])
        for i in sample
    ]
    return max(1, round(sum(sizes) / len(sizes) * len(task) / seq_len))
