//! Finds out whether SQLite has read all of a write-ahead log (WAL): it reads a WAL up to the first bad
//! frame, and says nothing about the rest. The format is in SQLite's "WAL-mode File Format".
//!
//! Not here: the contents of its pages.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes before the first frame.
const HEADER: u64 = 32;
/// Bytes before the page in each frame.
const FRAME_HEADER: usize = 24;

/// What was found in a WAL before SQLite opened it. Frames count from 1.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// The header is invalid: SQLite reads nothing of this WAL.
    broken: bool,
    /// The last complete frame since the WAL was last restarted. Older frames, which are in the database by
    /// now, stay behind it until they are overwritten.
    last: u64,
    /// The last such frame that ends a transaction.
    last_commit: u64,
    /// Another such frame begins at the end of the file, and is incomplete.
    torn: bool,
}

/// What SQLite has not read of a WAL.
#[derive(Debug, PartialEq, Eq)]
pub enum Skipped {
    /// Nothing.
    Nothing,
    /// Transactions that were committed.
    Transactions,
    /// The beginning of a transaction, as after a kill in the middle of one.
    Beginning,
}

impl Scan {
    /// Reads the headers of the WAL and its frames. The file may be missing.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn of(path: &Path) -> io::Result<Self> {
        match File::open(path) {
            Ok(file) => Self::read(&file, file.metadata()?.len()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    fn read(file: &File, size: u64) -> io::Result<Self> {
        let mut scan = Self::default();
        if size <= HEADER {
            return Ok(scan);
        }
        let mut header = [0; HEADER as usize];
        file.read_exact_at(&mut header, 0)?;
        let page = u64::from(number(&header, 8));
        if !is_sound(&header) || page == 0 {
            scan.broken = true;
            return Ok(scan);
        }
        let frame = page + FRAME_HEADER as u64;
        let salts = &header[16..24];
        let mut at = HEADER;
        let mut count = 0;
        let mut bytes = [0; FRAME_HEADER];
        while at + FRAME_HEADER as u64 <= size {
            file.read_exact_at(&mut bytes, at)?;
            count += 1;
            let current = bytes[8..16] == *salts;
            if at + frame > size {
                scan.torn = current;
            } else if current {
                scan.last = count;
                if number(&bytes, 4) > 0 {
                    scan.last_commit = count;
                }
            }
            at += frame;
        }
        Ok(scan)
    }

    /// What SQLite has skipped if it has read this many frames.
    pub fn skipped(&self, read: u64) -> Skipped {
        if self.broken || self.last_commit > read {
            Skipped::Transactions
        } else if self.last > read || self.torn {
            Skipped::Beginning
        } else {
            Skipped::Nothing
        }
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4]
        .iter()
        .fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// Whether a header's checksum is right. The last bit of the magic number tells the byte order that it was
/// computed with.
fn is_sound(header: &[u8; HEADER as usize]) -> bool {
    let magic = number(header, 0);
    if magic & !1 != 0x377f_0682 {
        return false;
    }
    let word = |at| match magic & 1 {
        1 => number(header, at),
        _ => number(header, at).swap_bytes(),
    };
    let (mut first, mut second) = (0_u32, 0_u32);
    for at in (0..24).step_by(8) {
        first = first.wrapping_add(word(at)).wrapping_add(second);
        second = second.wrapping_add(word(at + 4)).wrapping_add(first);
    }
    (first, second) == (number(header, 24), number(header, 28))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;
    use std::fs;
    use std::path::PathBuf;
    use tempfile::TempDir;

    const FRAME: usize = 4096 + FRAME_HEADER;

    /// A WAL that was restarted: frames from before that follow the current ones.
    fn log() -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        let connection = Connection::open(&file).unwrap();
        connection
            .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t (x)")
            .unwrap();
        let insert = |count: usize| {
            for _ in 0..count {
                connection
                    .execute("INSERT INTO t VALUES (zeroblob(9000))", [])
                    .unwrap();
            }
        };
        insert(20);
        connection
            .query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))
            .unwrap();
        insert(5);
        for [name, copy] in [["a", "b"], ["a-wal", "b-wal"]] {
            fs::copy(folder.path().join(name), folder.path().join(copy)).unwrap();
        }
        let log = folder.path().join("b-wal");
        (folder, log)
    }

    /// How many frames SQLite reads of a WAL, and what it skips.
    fn skipped(log: &Path) -> (u64, Skipped) {
        let found = Scan::of(log).unwrap();
        let database = log.with_file_name("b");
        let connection = Connection::open(database).unwrap();
        let read = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get(1));
        let read: i64 = read.unwrap();
        (read.unsigned_abs(), found.skipped(read.unsigned_abs()))
    }

    fn change(log: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(log).unwrap();
        change(&mut bytes);
        fs::write(log, bytes).unwrap();
    }

    #[test]
    fn frames_of_an_earlier_generation_are_not_missed() {
        let (_folder, path) = log();
        let frames = fs::metadata(&path).unwrap().len() / FRAME as u64;
        let (read, skipped) = skipped(&path);
        assert!((5..frames).contains(&read), "{read} of {frames}");
        assert_eq!(skipped, Skipped::Nothing);
    }

    #[test]
    fn a_log_that_is_not_there_or_empty_leaves_nothing_out() {
        let (_folder, path) = log();
        change(&path, Vec::clear);
        assert_eq!(Scan::of(&path).unwrap(), Scan::default());
        fs::remove_file(&path).unwrap();
        assert_eq!(Scan::of(&path).unwrap(), Scan::default());
    }

    #[test]
    fn what_is_behind_damage_is_missed() {
        let whole = skipped(&log().1).0;
        // In the header, in a frame's header, in its page.
        for at in [3, 9, 17, 28, 32 + FRAME, 32 + FRAME + 9, 32 + FRAME + 999] {
            let (_folder, path) = log();
            change(&path, |bytes| bytes[at] ^= 0x40);
            let (read, skipped) = skipped(&path);
            assert!(read < whole, "byte {at}");
            assert_eq!(skipped, Skipped::Transactions, "byte {at}");
        }
    }

    #[test]
    fn a_transaction_that_was_cut_off_is_told_from_one_that_was_complete() {
        let whole = usize::try_from(skipped(&log().1).0).unwrap();
        for (bytes_off, expected) in [
            (0, Skipped::Nothing),
            (1, Skipped::Beginning),
            (FRAME - FRAME_HEADER, Skipped::Beginning),
        ] {
            let (_folder, path) = log();
            change(&path, |bytes| {
                bytes.truncate(32 + whole * FRAME - bytes_off)
            });
            assert_eq!(skipped(&path).1, expected, "{bytes_off} bytes off");
        }
    }
}
