-- The schema of the third release.
CREATE TABLE queues (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    owner           BLOB NOT NULL,
    destination     TEXT NOT NULL,
    exports         INTEGER NOT NULL DEFAULT 0,
    failures        INTEGER NOT NULL DEFAULT 0,
    next_attempt_at INTEGER NOT NULL DEFAULT 0,
    failing_since   INTEGER NOT NULL DEFAULT 0,
    last_error      TEXT,
    UNIQUE (owner, destination)
) STRICT;
CREATE TABLE exports (
    seq             INTEGER PRIMARY KEY,
    id              BLOB NOT NULL UNIQUE,
    queue           INTEGER NOT NULL,
    turn            INTEGER NOT NULL,
    accepted_at     INTEGER NOT NULL,
    running_at      INTEGER NOT NULL,
    attempts        INTEGER NOT NULL DEFAULT 0,
    first_moved_at  INTEGER,
    finished_at     INTEGER,
    idempotency_key TEXT,
    fingerprint     BLOB,
    last_error      TEXT,
    response        TEXT,
    payload         BLOB
) STRICT;
CREATE INDEX unfinished ON exports (queue, turn) WHERE finished_at IS NULL;
CREATE INDEX moved ON exports (queue, running_at)
    WHERE finished_at IS NULL AND first_moved_at IS NOT NULL;
CREATE INDEX finished ON exports (finished_at) WHERE finished_at IS NOT NULL;
CREATE UNIQUE INDEX repeats ON exports (queue, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE TABLE running (millis INTEGER NOT NULL) STRICT;
INSERT INTO running VALUES (0);
CREATE VIEW overview AS
    SELECT seq,
        lower(substr(hex(exports.id), 1, 8) || '-' || substr(hex(exports.id), 9, 4) || '-' ||
            substr(hex(exports.id), 13, 4) || '-' || substr(hex(exports.id), 17, 4) || '-' ||
            substr(hex(exports.id), 21)) AS id,
        CAST(owner AS TEXT) AS owner, destination,
        datetime(accepted_at / 1000, 'unixepoch') AS accepted,
        datetime(finished_at / 1000, 'unixepoch') AS finished,
        attempts, coalesce(response ->> 'status', 'waiting') AS status,
        coalesce(exports.last_error, queues.last_error) ->> 'message' AS last_error
    FROM exports JOIN queues ON queues.id = queue;
PRAGMA application_id = 1163415635;
PRAGMA user_version = 3;
