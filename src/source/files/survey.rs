//! What lies around the files that a source names: where known files are by now, and rotated
//! siblings that nobody knows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::discovery::{names, sweep};
use super::recognition::Found;
use super::siblings::{are_related, base, is_of_family};
use super::tail::{Inode, OpenError, Tail};
use crate::descriptors;
use crate::state::Stamp;

/// How often folders are listed anew where files move meanwhile, before it is left to the next
/// sweep.
const LISTINGS_MAX: usize = 10;

/// What to look around for.
#[derive(Debug, Default)]
pub struct Scope {
    /// Paths whose families are looked up (of known runs, of files just found, of sources), with
    /// the number of their source.
    pub bases: Vec<(PathBuf, usize)>,
    /// Patterns of further places of rotated files, with the number of their source.
    pub rotated: Vec<(String, usize)>,
    /// Families that are not looked at now, wherever their files lie.
    pub absent: HashSet<PathBuf>,
}

/// What there is.
#[derive(Debug)]
pub struct Survey {
    /// Files to recognise: those that were found before, and their unknown relatives.
    pub found: Vec<Found>,
    /// Where each file was listed, and what it looked like.
    pub places: HashMap<Inode, (PathBuf, Stamp)>,
}

type Listing = BTreeMap<PathBuf, Listed>;

/// A file that was listed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listed {
    inode: Inode,
    stamp: Stamp,
    /// Number of its source.
    pub source: usize,
    /// It lies where the source says that rotated files lie too.
    pub elsewhere: bool,
}

/// Why there is no survey now. Half of one would take files for gone that are there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum SurveyError {
    /// More files than there are descriptors for.
    #[error("there are too many files to compare them all at once; {}", descriptors::ADVICE)]
    Crowded,
    /// Names never stand still.
    #[error("files are renamed faster than they can be opened")]
    Moving,
}

/// Adds relatives to the files found, `opened_max` at most, except those that `is_known` says need no look.
///
/// A rotation while we look renames a file from a name that we have not opened yet to one that we
/// have: the names are listed again afterwards, until nothing has moved.
pub fn survey(
    mut found: Vec<Found>,
    scope: &Scope,
    opened_max: usize,
    is_known: impl Fn(Inode, Stamp) -> bool,
) -> Result<Survey, SurveyError> {
    let wanted = found.len();
    for _ in 0..LISTINGS_MAX {
        let before = list(scope)?;
        let mut places: HashMap<Inode, (PathBuf, Stamp)> = HashMap::new();
        for (path, listed) in &before {
            places.entry(listed.inode).or_insert_with(|| (path.clone(), listed.stamp));
            let is_found = found.iter().any(|found| found.tail.inode() == listed.inode);
            if is_found || is_known(listed.inode, listed.stamp) {
                continue;
            }
            if found.len() - wanted >= opened_max {
                return Err(SurveyError::Crowded);
            }
            let tail = match Tail::open(path, false) {
                Ok(tail) => tail,
                Err(OpenError::Exhausted(_)) => return Err(SurveyError::Crowded),
                Err(_) => continue,
            };
            let Listed { source, elsewhere, .. } = *listed;
            found.push(Found { path: path.clone(), tail, source, wanted: false, elsewhere });
        }
        let after = list(scope)?;
        let moved = |(path, listed): (&PathBuf, &Listed)| {
            after.get(path).is_none_or(|now| now.inode != listed.inode)
        };
        if before.len() == after.len() && !before.iter().any(moved) {
            for found in &mut found {
                if let Some((path, _)) = places.get(&found.tail.inode()) {
                    found.path.clone_from(path);
                }
            }
            return Ok(Survey { found, places });
        }
        found.truncate(wanted);
    }
    Err(SurveyError::Moving)
}

/// The families of the paths in the scope and what lies in the places of rotated files, as it is now.
///
/// # Errors
///
/// For want of descriptors.
pub fn list(scope: &Scope) -> Result<BTreeMap<PathBuf, Listed>, SurveyError> {
    let mut folders: BTreeMap<&Path, BTreeMap<&[u8], usize>> = BTreeMap::new();
    for (path, source) in scope.bases.iter().filter(|(path, _)| path.is_absolute()) {
        if let (Some(folder), Some(name)) = (path.parent(), path.file_name()) {
            folders.entry(folder).or_default().entry(base(name.as_bytes())).or_insert(*source);
        }
    }
    let mut listing = Listing::new();
    for (pattern, source) in &scope.rotated {
        let swept = sweep(pattern);
        if swept.unreadable.iter().any(|(_, error)| descriptors::advice(error).is_some()) {
            return Err(SurveyError::Crowded);
        }
        let is_absent =
            |path: &PathBuf| scope.absent.iter().any(|family| are_related(family, path, true));
        for path in swept.paths.into_iter().filter(|path| !is_absent(path)) {
            note(&mut listing, path, *source, true);
        }
    }
    for (folder, families) in folders {
        for name in names(folder).map_err(|_| SurveyError::Crowded)? {
            let is_member = |(base, _): &(&&[u8], &usize)| is_of_family(base, name.as_bytes());
            if let Some((_, source)) = families.iter().find(is_member) {
                note(&mut listing, folder.join(&name), *source, false);
            }
        }
    }
    Ok(listing)
}

fn note(listing: &mut Listing, path: PathBuf, source: usize, elsewhere: bool) {
    let Ok(metadata) = path.symlink_metadata() else { return };
    if metadata.is_file() {
        let (inode, stamp) = (Inode::of(&metadata), Stamp::of(&metadata));
        listing.entry(path).or_insert(Listed { inode, stamp, source, elsewhere });
    }
}
