"""Brings every block to its commit: one round after the other, or several at the same time where workers allow it.

The driver decides nothing here that a restart would decide otherwise: what is done is read from the store, what may
start follows from it. Entry: `BlockRuns.run`.
"""

import logging
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from nf_pipeline.config import RunConfig
from nf_pipeline.core.partition import budget_for
from nf_pipeline.core.results import Results
from nf_pipeline.driver.early_end import EarlyEnd, find_early_end, may_end_early, read_results
from nf_pipeline.driver.retention import Retention, check_readable
from nf_pipeline.driver.round_schedule import Round, RoundSchedule
from nf_pipeline.driver.round_store import RoundStore
from nf_pipeline.driver.stage_runner import StageRunner, StageWork
from nf_pipeline.driver.stages import block_stage
from nf_pipeline.errors import InputReplaced, RunInterrupted
from nf_pipeline.events import Event, Publishing, StageFailed
from nf_pipeline.executors.base import Executor, Resources
from nf_pipeline.plans import BlockPlan, Plan
from nf_pipeline.retry import shrink_batch
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.worker.stage_input import read_block
from nf_pipeline.worker.tasks import BLOCK_STAGE, BlockTask, num_rounds

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2


class BlockRuns:
    """All rounds of all blocks of one run.

    Attributes:
        early_end: the decision to train no further block, None if there was none.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        layout: RunLayout,
        runner: StageRunner,
        executor: Executor,
        device: str,
    ) -> None:
        self._device = device
        self._config = config
        self._plan = plan
        self._layout = layout
        self._runner = runner
        self._executor = executor
        self._rounds = RoundStore(config, plan, layout, runner)
        self._retention = Retention(runner.store, layout, config.storage.keep_activations, plan)
        self._results: list[list[Results]] = []
        self._failed: dict[Round, BaseException] = {}
        self._num_found = 0
        self._num_val = 0
        self.early_end: EarlyEnd | None = None

    @property
    def skipped_s(self) -> float:
        """Seconds that the blocks took which were found finished."""
        return self._rounds.skipped_s

    def run(self, ingest: StageManifest) -> list[StageManifest]:
        """Trains what is not trained yet.

        Args:
            ingest: what the first block reads.

        Returns:
            The committed blocks, in order: fewer than planned if deeper exits would not pay.

        Raises:
            NFError: the first error for good of any round; the others are stopped.
        """
        done, rounds = self._rounds.find_done(ingest), num_rounds(self._config)
        self._num_val = ingest.num_rows("val")
        overlap = self._config.cluster.overlap and self._executor.is_parallel
        sources = [block.source_block for block in self._plan.blocks]
        found = self._rounds.find_ahead(done)
        schedule = RoundSchedule(done, rounds, overlap=overlap, found=found, sources=sources)
        self._num_found = max(found, default=-1) + 1
        self._rounds.retire(schedule.retired())
        self._end_early(schedule)
        for block_idx, count in enumerate(done[: schedule.num_blocks]):
            if count == rounds:
                self._retention.block_done(block_idx)
            else:
                if sources[block_idx] >= 0 and done[sources[block_idx]] == rounds:
                    check_readable(self._runner.store, self._layout, self._plan, block_idx)
                self._executor.check(block_stage(block_idx), self._resources(block_idx))
        (self._run_parallel if self._executor.is_parallel else self._run_serial)(schedule)
        return [read_block(self._runner.store, self._layout, idx) for idx in range(schedule.num_blocks)]

    def _run_serial(self, schedule: RoundSchedule) -> None:
        while not schedule.is_finished:
            work = schedule.ready()[0]
            self._train(work, schedule)
            self._take(schedule, work)

    def _run_parallel(self, schedule: RoundSchedule) -> None:
        running: dict[Future[None], Round] = {}
        pool = ThreadPoolExecutor(len(self._plan.blocks), thread_name_prefix="stage")
        try:
            while not schedule.is_finished:
                for work in self._startable(schedule, running):
                    schedule.start(work)
                    running[pool.submit(self._train, work, schedule)] = work
                # Woken now and then: a round may have begun to publish.
                finished, _ = wait(running, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                for future in sorted(finished, key=running.__getitem__):
                    self._take_end(schedule, running.pop(future), future)
                self._raise_needed(schedule)
        finally:
            if not schedule.is_finished:
                self._executor.stop()
            pool.shutdown(wait=True)

    def _startable(self, schedule: RoundSchedule, running: Collection[Future[None]]) -> list[Round]:
        """Lists the rounds that are to start now.

        Raises:
            RunInterrupted: none is to start any more, and none runs.
        """
        if not running:
            self._runner.stop.check()
        return [] if self._runner.stop.is_asked else schedule.ready()

    def _take_end(self, schedule: RoundSchedule, work: Round, future: Future[None]) -> None:
        error = future.exception()
        if error is None:
            self._take(schedule, work)
        elif isinstance(error, InputReplaced | RunInterrupted):
            # Lost input: the next attempt of the block before may need the worker that this round held. And whoever
            # reads what this round was writing cannot finish its epoch any more.
            logger.info("%s", error)
            schedule.withdraw(work)
            schedule.give_back(work)
        else:
            self._failed[work] = error

    def _raise_needed(self, schedule: RoundSchedule) -> None:
        """Ends the run with an error for good, unless its block may be left out yet: then nobody needs it."""
        may_end = may_end_early(self._config)
        for work, error in sorted(self._failed.items(), key=lambda item: item[0]):
            is_known = not may_end or len(self._results) >= work.block_idx  # all before it are done
            if is_known and work.block_idx < schedule.num_blocks:
                raise error

    def _take(self, schedule: RoundSchedule, work: Round) -> None:
        self._rounds.take(work)
        schedule.finish(work)
        self._rounds.retire(schedule.retired())
        if work.round_idx == schedule.num_rounds - 1:
            self._retention.block_done(work.block_idx)
        self._end_early(schedule)

    def _end_early(self, schedule: RoundSchedule) -> None:
        """Leaves the other blocks out if they would not pay. Blocks that are trained already always count."""
        is_done = [count == schedule.num_rounds for count in schedule.done]
        num_done = is_done.index(False) if False in is_done else len(is_done)
        for block_idx in range(len(self._results), num_done):
            self._results.append(self._read_results(block_idx))
        if num_done < self._num_found:
            return
        self.early_end = find_early_end(self._config, len(self._plan.blocks), self._results)
        # A block that was running and has improved after all takes the end back.
        schedule.end_after(self.early_end.num_blocks if self.early_end else len(self._plan.blocks))

    def _read_results(self, block_idx: int) -> list[Results]:
        store, planned = self._runner.store, self._plan.blocks[block_idx]
        block, key = read_block(store, self._layout, block_idx), self._layout.block_manifest(block_idx)
        return read_results(store, key, block, self._plan, planned, self._num_val)

    def _train(self, work: Round, schedule: RoundSchedule) -> None:
        """Brings one round to its commit."""
        if schedule.is_found(work):
            return  # compared with its input when it is taken

        def listen(event: Event) -> None:
            if isinstance(event, Publishing):
                schedule.publish(work)
            elif isinstance(event, StageFailed):
                schedule.withdraw(work)

        self._runner.run(self._stage(work, schedule), listen)

    def _stage(self, work: Round, schedule: RoundSchedule) -> StageWork:
        """Describes the stage that trains a round, from where the round before it ended."""
        name, block_idx = block_stage(work.block_idx), work.block_idx
        if work.round_idx == 0:
            planned, attempts = self._plan.blocks[block_idx].batch_size, self._rounds.count_attempts(block_idx)
        else:
            facts = self._rounds.manifest(Round(block_idx, work.round_idx - 1)).facts
            planned, attempts = facts["batch_size"], facts["attempts"] - 1

        def make_task(attempt: str, num_attempts: int, shrunk: int) -> BlockTask:
            batch_size = planned
            for _ in range(shrunk):
                batch_size = shrink_batch(name, batch_size)
            return BlockTask(
                config=self._config,
                plan=self._plan,
                block_idx=block_idx,
                round_idx=work.round_idx,
                batch_size=batch_size,
                attempt=attempt,
                num_attempts=num_attempts,
                num_threads=self._config.cluster.num_threads,
            )

        return StageWork(
            name=name,
            function=BLOCK_STAGE,
            make_task=make_task,
            resources=self._resources(block_idx),
            commit_key=self._rounds.key(work),
            attempts_before=attempts,
            is_wanted=lambda: schedule.has_input(work),
            is_left_out=lambda: work.block_idx >= schedule.num_blocks,
        )

    def _resources(self, block_idx: int) -> Resources:
        return Resources(
            num_cpus=self._config.cluster.num_threads,
            device=self._device,
            memory_bytes=memory_of(self._config, self._plan.blocks[block_idx]),
            num_workers=self._config.train.workers_per_block,
        )


def memory_of(config: RunConfig, block: BlockPlan) -> int:
    """Returns what a worker of a block must be able to hold: its predicted peak and the margin on top."""
    return min(block.budget_bytes, budget_for(block.predicted_peak_bytes, config.memory))
