//! A model of a folder on a disk whose power may fail: what is there for certain, and what may be.
//!
//! Each sector of a file holds what it held at some moment since the file was last synced, each sector at a
//! moment of its own, and the file's length is from such a moment too. So a write may be there, not at all,
//! in part, or before an earlier one. That a file was cut is never there by half, and it is there if anything
//! is that was written behind the cut later. Changes of a folder since it was last synced may each be there or
//! not; a rename is never there by half.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::random::Random;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    File(usize),
    Folder(usize),
}

/// A change of a file.
enum Change {
    Write(u64, Vec<u8>),
    Truncate(u64),
}

/// A change of a folder.
#[derive(Clone)]
enum Naming {
    Set(String, Node),
    Remove(String, Node),
    Rename(String, String, Node),
}

type Names = BTreeMap<String, Node>;

#[derive(Default)]
struct File {
    durable: Vec<u8>,
    current: Vec<u8>,
    /// Each with the number of its event.
    pending: Vec<(usize, Change)>,
}

#[derive(Default)]
struct Folder {
    durable: Names,
    current: Names,
    pending: Vec<(usize, Naming)>,
}

/// What becomes of changes that were not synced.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// All are lost.
    Lost,
    /// All are there, as after a kill.
    There,
    /// All up to one of them, which may be torn.
    Prefix,
    /// Each sector is from the beginning or the end.
    Halves,
    /// Each sector is from any moment.
    Any,
}

/// Sectors of old and of new disks.
const SECTORS: [usize; 2] = [512, 4096];

/// The folder of the test, and everything in it.
pub struct Disk {
    root: PathBuf,
    files: Vec<File>,
    folders: Vec<Folder>,
}

impl Disk {
    /// A disk that holds for certain what is in this folder now, at another path.
    pub fn of(contents: &Path, root: &Path) -> Self {
        let mut disk = Self {
            root: root.to_owned(),
            files: Vec::new(),
            folders: Vec::new(),
        };
        disk.add(contents);
        disk
    }

    fn add(&mut self, path: &Path) -> Node {
        if path.is_file() {
            let bytes = fs::read(path).unwrap();
            self.files.push(File {
                durable: bytes.clone(),
                current: bytes,
                pending: Vec::new(),
            });
            return Node::File(self.files.len() - 1);
        }
        let number = self.folders.len();
        self.folders.push(Folder::default());
        for entry in fs::read_dir(path).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let node = self.add(&path.join(&name));
            self.folders[number].durable.insert(name, node);
        }
        self.folders[number].current = self.folders[number].durable.clone();
        Node::Folder(number)
    }

    fn find(&self, path: &Path) -> Option<Node> {
        let mut node = Node::Folder(0);
        for part in path.strip_prefix(&self.root).unwrap().components() {
            let (Component::Normal(name), Node::Folder(folder)) = (part, node) else {
                panic!("{}", path.display());
            };
            node = *self.folders[folder].current.get(name.to_str()?)?;
        }
        Some(node)
    }

    fn file(&mut self, path: &Path) -> &mut File {
        match self.find(path) {
            Some(Node::File(file)) => &mut self.files[file],
            _ => panic!("{} is no file", path.display()),
        }
    }

    fn parent(&self, path: &Path) -> (usize, String) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        match self.find(path.parent().unwrap()) {
            Some(Node::Folder(folder)) => (folder, name),
            _ => panic!("{} is in no folder", path.display()),
        }
    }

    fn change(&mut self, number: usize, folder: usize, naming: Naming) {
        let folder = &mut self.folders[folder];
        naming.apply(&mut folder.current);
        folder.pending.push((number, naming));
    }

    /// Opens a file, and creates it if it is not there.
    pub fn create(&mut self, number: usize, path: &Path) {
        if self.find(path).is_none() {
            self.files.push(File::default());
            let node = Node::File(self.files.len() - 1);
            let (folder, name) = self.parent(path);
            self.change(number, folder, Naming::Set(name, node));
        }
    }

    pub fn make_folder(&mut self, number: usize, path: &Path) {
        self.folders.push(Folder::default());
        let node = Node::Folder(self.folders.len() - 1);
        let (folder, name) = self.parent(path);
        self.change(number, folder, Naming::Set(name, node));
    }

    /// Removes a file or folder. The journal does not see sockets being made, only their removal.
    pub fn remove(&mut self, number: usize, path: &Path) {
        if let Some(node) = self.find(path) {
            let (folder, name) = self.parent(path);
            self.change(number, folder, Naming::Remove(name, node));
        } else {
            assert!(
                path.extension().is_some_and(|end| end == "sock"),
                "{path:?}"
            );
        }
    }

    pub fn link(&mut self, number: usize, from: &Path, to: &Path) {
        let node = self.find(from).unwrap();
        let (folder, name) = self.parent(to);
        self.change(number, folder, Naming::Set(name, node));
    }

    /// Renames within a folder.
    pub fn rename(&mut self, number: usize, from: &Path, to: &Path) {
        let node = self.find(from).unwrap();
        let ((folder, from), (other, to)) = (self.parent(from), self.parent(to));
        assert_eq!(folder, other);
        self.change(number, folder, Naming::Rename(from, to, node));
    }

    pub fn write(&mut self, number: usize, path: &Path, at: u64, bytes: &[u8]) {
        self.file(path)
            .change(number, Change::Write(at, bytes.to_owned()));
    }

    pub fn truncate(&mut self, number: usize, path: &Path, length: u64) {
        self.file(path).change(number, Change::Truncate(length));
    }

    /// A sync that has succeeded. It covers changes with smaller numbers than `began`: later ones came
    /// while it ran.
    pub fn sync(&mut self, began: usize, path: &Path) {
        match self.find(path) {
            Some(Node::File(file)) => {
                let file = &mut self.files[file];
                let covered = file.pending.partition_point(|(number, _)| *number < began);
                for (_, change) in file.pending.drain(..covered) {
                    change.apply(&mut file.durable);
                }
            }
            Some(Node::Folder(folder)) => {
                let folder = &mut self.folders[folder];
                let covered = folder
                    .pending
                    .partition_point(|(number, _)| *number < began);
                for (_, naming) in folder.pending.drain(..covered) {
                    naming.apply(&mut folder.durable);
                }
            }
            None => panic!("{} is not there", path.display()),
        }
    }

    /// The files that differ from those in the folder, which have to be as the journal says. Shared memory
    /// is left out, as are sockets.
    pub fn differences(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        self.compare(0, &self.root, &mut found);
        found
    }

    fn compare(&self, folder: usize, path: &Path, found: &mut Vec<PathBuf>) {
        let on_disk = fs::read_dir(path).unwrap();
        for path in on_disk.map(|entry| entry.unwrap().path()) {
            let known = self.find(&path).is_some();
            if !known && (path.is_file() || path.is_dir()) {
                found.push(path);
            }
        }
        for (name, node) in &self.folders[folder].current {
            let path = path.join(name);
            match node {
                Node::Folder(folder) if path.is_dir() => self.compare(*folder, &path, found),
                Node::File(_) if name.ends_with("-shm") => {}
                Node::File(file)
                    if fs::read(&path).ok().as_ref() == Some(&self.files[*file].current) => {}
                _ => found.push(path),
            }
        }
    }

    /// Takes a file as it is in the folder, as a change that was not synced: for calls that a kill
    /// interrupted, of which the journal does not know whether they were carried out.
    pub fn take(&mut self, number: usize, path: &Path) {
        match fs::read(path) {
            Ok(bytes) => {
                self.create(number, path);
                self.truncate(number, path, bytes.len() as u64);
                self.write(number, path, 0, &bytes);
            }
            Err(_) => self.remove(number, path),
        }
    }

    /// Writes a state that a loss of power at this moment may leave behind. Returns how it was chosen.
    pub fn leave(&self, random: &mut Random, to: &Path) -> String {
        let fate = *random.pick(&[
            Fate::Lost,
            Fate::There,
            Fate::Prefix,
            Fate::Prefix,
            Fate::Halves,
            Fate::Any,
            Fate::Any,
        ]);
        let sector = *random.pick(&SECTORS);
        self.leave_folder(0, fate, sector, random, to);
        format!("unsynced changes: {fate:?}, in sectors of {sector}")
    }

    fn leave_folder(
        &self,
        folder: usize,
        fate: Fate,
        sector: usize,
        random: &mut Random,
        to: &Path,
    ) {
        fs::create_dir_all(to).unwrap();
        for (name, node) in self.folders[folder].left(fate, random) {
            let path = to.join(&name);
            match node {
                Node::Folder(folder) => self.leave_folder(folder, fate, sector, random, &path),
                // Rebuilt at each start.
                Node::File(_) if name.ends_with("-shm") => {}
                Node::File(file) => {
                    fs::write(path, self.files[file].left(fate, sector, random)).unwrap();
                }
            }
        }
    }
}

impl Folder {
    fn left(&self, fate: Fate, random: &mut Random) -> Names {
        let mut names = self.durable.clone();
        let last = random.below(self.pending.len() + 1);
        for (at, (_, naming)) in self.pending.iter().enumerate() {
            let there = match fate {
                Fate::Lost => false,
                Fate::There => true,
                Fate::Prefix => at < last,
                Fate::Halves | Fate::Any => random.one_in(2),
            };
            if there {
                naming.apply(&mut names);
            }
        }
        names
    }
}

impl File {
    fn change(&mut self, number: usize, change: Change) {
        change.apply(&mut self.current);
        self.pending.push((number, change));
    }

    fn left(&self, fate: Fate, sector: usize, random: &mut Random) -> Vec<u8> {
        let count = self.pending.len();
        let last = match fate {
            Fate::Lost => 0,
            Fate::There => count,
            _ => random.below(count + 1),
        };
        let cuts: Vec<_> = self.cuts().collect();
        // How many of the changes a sector with this end has seen. The first `last` have cut the file, and
        // later ones have not.
        let mut seen = |end| {
            let cuts = cuts.iter().filter(|(_, length)| *length < end);
            let (before, after): (Vec<_>, Vec<_>) = cuts.partition(|(at, _)| *at < last);
            let least = before.last().map_or(0, |(at, _)| at + 1);
            let most = after.first().map_or(count, |(at, _)| *at);
            let seen = match fate {
                Fate::Lost | Fate::There => last,
                Fate::Prefix => last + random.below(2),
                Fate::Halves => count * random.below(2),
                Fate::Any => random.below(count + 1),
            };
            seen.clamp(least, most)
        };
        let ends = self.pending.iter().map(|(_, change)| change.end());
        let longest = ends.max().unwrap_or(0).max(self.durable.len());
        let length_seen = seen(usize::MAX);
        let sectors = 0..longest.div_ceil(sector);
        let seen: Vec<_> = sectors.map(|nth| seen((nth + 1) * sector)).collect();
        let mut bytes = self.durable.clone();
        let mut length = bytes.len();
        bytes.resize(longest, 0);
        for (at, (_, change)) in self.pending.iter().enumerate() {
            let (start, end, new) = match change {
                Change::Write(start, new) => (offset(*start), change.end(), Some(new)),
                Change::Truncate(start) => (offset(*start), longest, None),
            };
            if at < length_seen {
                length = match new {
                    Some(_) => length.max(end),
                    None => start,
                };
            }
            let mut from = start;
            while from < end {
                let to = end.min((from / sector + 1) * sector);
                if at < seen[from / sector] {
                    match new {
                        Some(new) => {
                            bytes[from..to].copy_from_slice(&new[from - start..to - start])
                        }
                        None => bytes[from..to].fill(0),
                    }
                }
                from = to;
            }
        }
        bytes.truncate(length);
        bytes.resize(length, 0);
        bytes
    }

    /// The changes that cut the file, by their places and the lengths to which they cut it.
    fn cuts(&self) -> impl Iterator<Item = (usize, usize)> {
        let changes = self.pending.iter().enumerate();
        changes.filter_map(|(at, (_, change))| match change {
            Change::Truncate(length) => Some((at, offset(*length))),
            Change::Write(..) => None,
        })
    }
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, new) => {
                bytes.resize(bytes.len().max(self.end()), 0);
                bytes[offset(*at)..self.end()].copy_from_slice(new);
            }
            Self::Truncate(length) => bytes.resize(offset(*length), 0),
        }
    }

    /// The least length of a file that has room for it.
    fn end(&self) -> usize {
        match self {
            Self::Write(at, new) => offset(*at) + new.len(),
            Self::Truncate(length) => offset(*length),
        }
    }
}

impl Naming {
    fn apply(&self, names: &mut Names) {
        let mut remove = |name: &String, node: &Node| {
            // If an earlier change is lost, there may be another one of that name, or none.
            if names.get(name) == Some(node) {
                names.remove(name);
            }
        };
        match self {
            Self::Remove(name, node) => remove(name, node),
            Self::Rename(from, _, node) => remove(from, node),
            Self::Set(..) => {}
        }
        if let Self::Set(name, node) | Self::Rename(_, name, node) = self {
            names.insert(name.clone(), *node);
        }
    }
}

fn offset(at: u64) -> usize {
    usize::try_from(at).unwrap()
}
