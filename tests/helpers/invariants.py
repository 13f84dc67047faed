"""What must be true of a farm's data, whatever was done to it."""

from __future__ import annotations

from typing import Any, List, Mapping, Tuple

import povfarm

ALIVE = "(SELECT id FROM job)"  # of a job that was deleted, rows are left for a while
LOOKS: Mapping[str, str] = {
    "job {}: counters differ from its tasks": """
        SELECT job.id FROM job
        LEFT JOIN task ON task.job = job.id AND task.slice = 0 GROUP BY job.id
        HAVING queued != COALESCE(SUM(task.state = 'queued'), 0)
            OR leased != COALESCE(SUM(task.state = 'leased'), 0)
            OR done != COALESCE(SUM(task.state = 'done'), 0)
            OR failed != COALESCE(SUM(task.state = 'failed'), 0)
            OR cancelled != COALESCE(SUM(task.state = 'cancelled'), 0)
            OR runs != (SELECT COUNT(*) FROM lease
                        WHERE lease.job = job.id AND lease.ended IS NULL)""",
    "owner {}: what is counted of the jobs is not what they are": """
        WITH truth AS (
          SELECT owner, priority, SUM(state = 'active') AS active, SUM(runs) AS runs,
                 SUM(finished IS NULL) AS jobs, SUM(kept) AS kept,
                 SUM((finished IS NULL) * (queued + leased)) AS frames
          FROM job GROUP BY owner, priority)
        SELECT turn.owner FROM turn LEFT JOIN truth USING (owner, priority)
        WHERE turn.active != COALESCE(truth.active, 0) OR turn.runs != COALESCE(truth.runs, 0)
           OR turn.jobs != COALESCE(truth.jobs, 0) OR turn.kept != COALESCE(truth.kept, 0)
           OR turn.frames != COALESCE(truth.frames, 0)
        UNION SELECT owner FROM truth WHERE NOT EXISTS (
          SELECT 1 FROM turn WHERE turn.owner = truth.owner AND turn.priority = truth.priority)""",
    "job {}: it keeps more or fewer bytes than are counted": """
        SELECT job.id FROM job WHERE kept != COALESCE((
          SELECT SUM(size) FROM task WHERE task.job = job.id AND parent IS NULL), 0) + COALESCE((
          SELECT SUM(size) FROM written WHERE written.job = job.id), 0) + (
          SELECT COALESCE(SUM(size), 0) FROM (
            SELECT DISTINCT json_extract(file.value, '$.sha256'),
                   COALESCE(blob.size, json_extract(file.value, '$.size')) AS size
            FROM manifest, json_each(manifest.wire, '$.files') AS file
            LEFT JOIN blob ON blob.sha256 = json_extract(file.value, '$.sha256')
            WHERE manifest.key = job.manifest))""",
    "task {}: leased and not in work, or the reverse": f"""
        SELECT id FROM task WHERE job IN {ALIVE} AND cut IS NULL
        AND (state = 'leased') != EXISTS (
          SELECT 1 FROM attempt WHERE attempt.task = task.id AND attempt.state = 'live')""",
    "frame {}: its slices leave a gap, overlap or say another state": f"""
        SELECT frame.id FROM task AS frame JOIN task AS part
          ON part.parent = frame.id AND part.kind = 'slice'
        WHERE frame.job IN {ALIVE} AND frame.state IN ('queued', 'leased', 'failed')
        GROUP BY frame.id
        HAVING SUM(part.bottom - part.top) != frame.cut - frame.top
            OR (frame.state = 'queued' AND SUM(part.state IN ('leased', 'done')) > 0)""",
    "lease {}: live and empty or of a removed worker, or the reverse": f"""
        SELECT lease.id FROM lease JOIN worker ON worker.id = lease.worker
        WHERE lease.job IN {ALIVE} AND ((lease.ended IS NULL) != EXISTS (
            SELECT 1 FROM attempt WHERE attempt.lease = lease.id AND attempt.state = 'live')
        OR (lease.ended IS NULL AND worker.state IN ('pending', 'removed')))""",
    "task {}: two accepted results": """
        SELECT task FROM attempt WHERE state = 'done' GROUP BY task HAVING COUNT(*) > 1""",
}


def broken(scheduler: povfarm.Scheduler) -> List[str]:
    """Return what is wrong with the farm's data, in words: nothing, always."""
    store = scheduler.store
    with store.tx() as tx:  # not read(): what is in memory is to be of the same moment
        problems = [words.format(row[0]) for words, sql in LOOKS.items()
                    for row in tx._db.execute(sql)]
        known = {told(portion) for grant in scheduler.grants
                 for portion in grant.portions.values()}
        problems += [f"lease {lease[0]}: in memory it is another one"
                     for lease in known ^ {told_by_the_database(tx, row)
                                           for row in tx.live_attempts()}]
        jobs = {job.id: job for job in tx.jobs(0, -1)}
        blobs = tx._db.execute("""
            SELECT manifest_blob.sha256 FROM job
            JOIN manifest_blob ON manifest_blob.manifest = job.manifest
            WHERE job.state = 'active' UNION SELECT sha256 FROM written""").fetchall()
        stored, done = set(tx.stored_blobs()), tx.done_tasks()
    problems += [f"job {job.id}: {job.state} does not fit its tasks" for job in jobs.values()
                 if povfarm.job_state(job.state, job.counts) is not job.state]
    problems += [f"blob {sha256}: needed and not stored" for sha256, in blobs
                 if sha256 not in stored or not store.blob_path(sha256).is_file()]
    for row in done:
        path = store.place(jobs[row.job], row)
        outside = "/" in row.name or path.parent.parent.parent not in (store.root, store.root / "jobs")
        if outside or not path.is_file() or povfarm.sha256_file(path) != row.sha256:
            problems.append(f"task {row.id}: {path} is missing or not what was accepted")
    return problems


def told(portion: povfarm.Portion) -> Tuple[Any, ...]:
    """What memory says that a worker was given, and is to make of it."""
    grant = portion.grant
    return grant.id, grant.worker, grant.job, portion.task, portion.given, portion.bottom, grant.cut


def told_by_the_database(tx: povfarm.Tx, row: povfarm.Attempt) -> Tuple[Any, ...]:
    """The same, from the rows alone."""
    height = tx.job(row.job).pov.options.height
    bottom, end = row.bottom or height, row.given or height
    given = row.task if row.given or row.kind is povfarm.TaskKind.FRAME else row.parent
    return (row.lease, row.worker, row.job, row.task, given, bottom,
            (given, bottom) if bottom < end else None)
