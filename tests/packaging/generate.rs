//! Writes the files that `scripts/package` packs and that are made from the declaration of the command line.
//! usage: packaging UNIT FOLDER

mod files;

use std::env;
use std::fs;
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let [unit, folder] = &arguments[..] else {
        return Err(io::Error::other("usage: packaging UNIT FOLDER"));
    };
    files::write(Path::new(folder), &fs::read_to_string(unit)?)
}
