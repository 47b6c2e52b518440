-- What the second release added to the schema of the first one, in a new file too.
ALTER TABLE exports ADD COLUMN running_at INTEGER NOT NULL DEFAULT 0;
ALTER TABLE exports ADD COLUMN first_moved_at INTEGER;
CREATE TABLE running (millis INTEGER NOT NULL) STRICT;
INSERT INTO running VALUES (0);
CREATE TABLE queues (
    owner           BLOB NOT NULL,
    destination     TEXT NOT NULL,
    failures        INTEGER NOT NULL,
    next_attempt_at INTEGER NOT NULL,
    failing_since   INTEGER NOT NULL,
    last_error      TEXT,
    PRIMARY KEY (owner, destination)
) STRICT, WITHOUT ROWID;
INSERT INTO queues
    SELECT owner, destination, failures,
        min(max(latest - unixepoch() * 1000, 0), 3600000), 0, last_error
    FROM (SELECT owner, destination, failures, last_error,
              max(coalesce(next_attempt_at, 0)) AS latest
          FROM exports WHERE failures > 0 AND finished_at IS NULL
          GROUP BY owner, destination);
UPDATE exports SET moved_at = moved_at - (SELECT max(moved_at) FROM exports)
    WHERE moved_at IS NOT NULL;
DROP INDEX delayed;
DROP INDEX repeats;
CREATE UNIQUE INDEX repeats ON exports (owner, destination, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
PRAGMA user_version = 2;
