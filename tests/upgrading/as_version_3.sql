-- The rows of a file of the second release, attached as `second`, in tables of the third.
INSERT INTO queues (owner, destination, exports, failures, next_attempt_at, failing_since, last_error)
SELECT e.owner, e.destination, count(*), coalesce(q.failures, 0), coalesce(q.next_attempt_at, 0),
    coalesce(q.failing_since, 0), q.last_error
FROM second.exports e LEFT JOIN second.queues q USING (owner, destination)
GROUP BY e.owner, e.destination;
INSERT INTO exports
SELECT seq, unhex(replace(e.id, '-', '')), q.id,
    row_number() OVER (ORDER BY coalesce(turn, seq), moved_at, seq), accepted_at, running_at, attempts,
    first_moved_at, finished_at, idempotency_key, fingerprint, e.last_error, response, payload
FROM second.exports e JOIN main.queues q USING (owner, destination);
UPDATE running SET millis = (SELECT millis FROM second.running);
