//! A file that is overwritten and synced, to see what the disk alone takes.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Bytes that are synced at a time.
const BLOCK: usize = 4096;
/// Blocks in the file.
const BLOCKS: usize = 256;

/// A file of which one block after the other is overwritten. It does not grow, as a store that has been in
/// use for a while does not: a sync of a growing file takes several times as long.
pub struct Disk {
    file: File,
    next: usize,
}

impl Disk {
    pub fn new(folder: &Path) -> Self {
        let mut file = File::create(folder.join("synced")).unwrap();
        file.write_all(&[0; BLOCK * BLOCKS]).unwrap();
        file.sync_all().unwrap();
        Self { file, next: 0 }
    }

    /// Overwrites the next block. Blocks until it is on the disk.
    pub fn sync(&mut self) {
        let offset = (self.next % BLOCKS * BLOCK) as u64;
        self.file.seek(SeekFrom::Start(offset)).unwrap();
        self.file.write_all(&[1; BLOCK]).unwrap();
        self.file.sync_data().unwrap();
        self.next += 1;
    }
}
