-- The schema of the first release.
CREATE TABLE exports (
    seq             INTEGER PRIMARY KEY,
    id              TEXT NOT NULL UNIQUE,
    owner           BLOB NOT NULL,
    destination     TEXT NOT NULL,
    payload         BLOB,
    accepted_at     INTEGER NOT NULL,
    finished_at     INTEGER,
    response        TEXT,
    attempts        INTEGER NOT NULL DEFAULT 0,
    last_error      TEXT,
    failures        INTEGER NOT NULL DEFAULT 0,
    next_attempt_at INTEGER,
    turn            INTEGER,
    moved_at        INTEGER,
    idempotency_key TEXT,
    fingerprint     BLOB
) STRICT;
CREATE INDEX unfinished ON exports (seq) WHERE finished_at IS NULL;
CREATE INDEX finished ON exports (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX delayed ON exports (owner, destination) WHERE failures > 0;
CREATE UNIQUE INDEX repeats ON exports (owner, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
PRAGMA application_id = 0x45585053;
PRAGMA user_version = 1;
