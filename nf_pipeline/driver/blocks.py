"""Brings every block to its commit: one round after the other, or several at the same time where workers allow it.

The driver decides nothing here that a restart would decide otherwise: what is done is read from the store, what may
start follows from it. Entry: `BlockRuns.run`.
"""

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from nf_pipeline.config import RunConfig
from nf_pipeline.core.partition import budget_for
from nf_pipeline.driver.round_schedule import Round, RoundSchedule
from nf_pipeline.driver.stage_runner import StageRunner, StageWork
from nf_pipeline.driver.stages import block_stage
from nf_pipeline.errors import InputReplaced, ObjectMissing, StorageError
from nf_pipeline.events import Event, Publishing, StageFailed
from nf_pipeline.executors.base import Executor, Resources
from nf_pipeline.plans import BlockPlan, Plan
from nf_pipeline.retry import shrink_batch
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.stage_input import read_block
from nf_pipeline.worker.tasks import BLOCK_STAGE, BlockTask, block_fingerprint, num_rounds

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2


class BlockRuns:
    """All rounds of all blocks of one run."""

    def __init__(
        self, config: RunConfig, plan: Plan, layout: RunLayout, runner: StageRunner, executor: Executor
    ) -> None:
        self.config = config
        self.plan = plan
        self.layout = layout
        self.runner = runner
        self.store: Store = runner.store
        self.executor = executor
        self.num_rounds = num_rounds(config)
        self.skipped_s = 0.0
        self._retired: set[Round] = set()

    def run(self, ingest: StageManifest) -> list[StageManifest]:
        """Trains what is not trained yet.

        Args:
            ingest: what the first block reads.

        Returns:
            The committed blocks, in order.

        Raises:
            NFError: the first error for good of any round; the others are stopped.
        """
        done = self._find_done(ingest)
        overlap = self.config.cluster.overlap and self.executor.is_parallel
        schedule = RoundSchedule(done, self.num_rounds, overlap=overlap, found=self._find_ahead(done))
        self._retire(schedule)
        for block_idx, count in enumerate(done):
            if count < self.num_rounds:
                self.executor.check(block_stage(block_idx), self._resources(block_idx))
        (self._run_parallel if self.executor.is_parallel else self._run_serial)(schedule)
        return [read_block(self.store, self.layout, idx) for idx in range(len(self.plan.blocks))]

    def _run_serial(self, schedule: RoundSchedule) -> None:
        while not schedule.is_finished:
            work = schedule.ready()[0]
            self._train(work, schedule)
            schedule.finish(work)
            self._retire(schedule)

    def _run_parallel(self, schedule: RoundSchedule) -> None:
        running: dict[Future[None], Round] = {}
        pool = ThreadPoolExecutor(len(self.plan.blocks), thread_name_prefix="stage")
        try:
            while not schedule.is_finished:
                for work in schedule.ready():
                    schedule.start(work)
                    running[pool.submit(self._train, work, schedule)] = work
                # Woken now and then: a round may have begun to publish.
                finished, _ = wait(running, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._take_end(schedule, running.pop(future), future)
        except BaseException:
            self.executor.stop()
            raise
        finally:
            pool.shutdown(wait=True)

    def _take_end(self, schedule: RoundSchedule, work: Round, future: Future[None]) -> None:
        try:
            future.result()
        except InputReplaced as replaced:
            # The block before was lost while it wrote; its next attempt may need the worker that this round held.
            logger.info("%s", replaced)
            schedule.give_back(work)
            return
        schedule.finish(work)
        self._retire(schedule)

    def _train(self, work: Round, schedule: RoundSchedule) -> None:
        """Brings one round to its commit."""
        block_idx = work.block_idx
        if self.num_rounds == 1 and block_idx > 0 and self._manifest(work) is not None:
            self._verify_final(block_idx, read_block(self.store, self.layout, block_idx - 1))
            return

        def listen(event: Event) -> None:
            if isinstance(event, Publishing):
                schedule.publish(work)
            elif isinstance(event, StageFailed):
                schedule.withdraw(work)

        self.runner.run(
            StageWork(
                name=block_stage(block_idx),
                function=BLOCK_STAGE,
                make_task=self._task_maker(work),
                resources=self._resources(block_idx),
                commit_key=self.layout.round_manifest(block_idx, work.round_idx, self.num_rounds),
                attempts_before=self._count_attempts(block_idx) - work.round_idx,
                is_wanted=lambda: schedule.has_input(work),
            ),
            listen,
        )

    def _task_maker(self, work: Round) -> Callable[[str, int, int], BlockTask]:
        name, planned = block_stage(work.block_idx), self._batch_size(work)

        def make_task(attempt: str, num_attempts: int, shrunk: int) -> BlockTask:
            batch_size = planned
            for _ in range(shrunk):
                batch_size = shrink_batch(name, batch_size)
            return BlockTask(
                config=self.config,
                plan=self.plan,
                block_idx=work.block_idx,
                round_idx=work.round_idx,
                batch_size=batch_size,
                attempt=attempt,
                num_attempts=num_attempts,
                num_threads=self.config.cluster.num_threads,
            )

        return make_task

    def _batch_size(self, work: Round) -> int:
        """Returns the planned batch, or what it was shrunk to in the round before."""
        if work.round_idx == 0:
            return self.plan.blocks[work.block_idx].batch_size
        before = self._manifest(Round(work.block_idx, work.round_idx - 1))
        return before.facts["batch_size"]

    def _resources(self, block_idx: int) -> Resources:
        return Resources(
            num_cpus=self.config.cluster.num_threads,
            device=self.config.train.device,
            memory_bytes=memory_of(self.config, self.plan.blocks[block_idx]),
            num_workers=self.config.train.workers_per_block,
        )

    def _find_done(self, ingest: StageManifest) -> list[int]:
        """Counts every block's committed rounds, after checking the newest."""
        done: list[int] = []
        before = ingest
        for block_idx in range(len(self.plan.blocks)):
            final = self._verify_final(block_idx, before)
            done.append(self.num_rounds if final else self._count_rounds(block_idx))
            before = final
        self._check_inputs(done)
        return done

    def _find_ahead(self, done: list[int]) -> frozenset[int]:
        """Lists the blocks that are finished though one before them is not: somebody took its commit away."""
        unfinished = [block_idx for block_idx, count in enumerate(done) if count < self.num_rounds]
        return frozenset(idx for idx in unfinished if self._manifest(Round(idx, self.num_rounds - 1)) is not None)

    def _check_inputs(self, done: list[int]) -> None:
        """Refuses what cannot be continued: rounds that were read are gone.

        Raises:
            ObjectMissing: a block must read a round that the block before has finished and deleted.
        """
        for block_idx, count in enumerate(done[1:], start=1):
            if count == self.num_rounds or done[block_idx - 1] <= count:
                continue
            if self._manifest(Round(block_idx - 1, count)) is None:
                raise ObjectMissing(
                    f"{block_stage(block_idx)} continues with round {count + 1}, whose input is no longer stored",
                    self.store.uri,
                    f"delete {self.layout.blocks} and resume: all blocks are trained again",
                )

    def _verify_final(self, block_idx: int, stage_input: StageManifest | None) -> StageManifest | None:
        """Returns a finished block's manifest."""
        if stage_input is None:
            return None
        block, key = self.plan.blocks[block_idx], self.layout.block_manifest(block_idx)
        fingerprint = block_fingerprint(self.config, block, self.num_rounds - 1, stage_input.content_checksum)
        done = self.runner.committed(block_stage(block_idx), key, fingerprint)
        if done is not None:
            self.skipped_s += done.facts["train_s"] + done.facts["write_s"]
        return done

    def _count_rounds(self, block_idx: int) -> int:
        rounds = [self.layout.round_of(key) for key, _ in self.store.list(self.layout.rounds(block_idx))]
        return max((round_idx + 1 for round_idx in rounds if round_idx is not None), default=0)

    def _manifest(self, work: Round) -> StageManifest | None:
        return read_manifest(self.store, self.layout.round_manifest(work.block_idx, work.round_idx, self.num_rounds))

    def _retire(self, schedule: RoundSchedule) -> None:
        """Deletes rounds that nobody reads any more: the commit first, so that it never names what is gone."""
        for work in schedule.retired():
            if work in self._retired:
                continue
            self._retired.add(work)
            try:
                manifest = self._manifest(work)
                if manifest is None:
                    continue
                self.store.delete([self.layout.round_manifest(work.block_idx, work.round_idx, self.num_rounds)])
                shards = [shard.key for infos in manifest.shards.values() for shard in infos]
                self.store.delete([*shards, manifest.weights.key])
            except StorageError as error:
                logger.warning("round %d of block %d could not be deleted: %s", work.round_idx, work.block_idx, error)

    def _count_attempts(self, block_idx: int) -> int:
        prefix = self.layout.block(block_idx)
        depth = prefix.count("/") + 1
        names = {key.split("/")[depth] for key, _ in self.store.list(prefix)}
        return sum(name.startswith("attempt-") for name in names)


def memory_of(config: RunConfig, block: BlockPlan) -> int:
    """Returns what a worker of a block must be able to hold: its predicted peak and the margin on top."""
    return min(block.budget_bytes, budget_for(block.predicted_peak_bytes, config.memory))
