//! Filebeat's registry.
//!
//! Since 7.9 a folder: `NUMBER.json` with everything up to that change, and `log.json` with what
//! came after it, two JSON values per change. (`active.dat` names the former; Filebeat does not read
//! it, nor do we.) Before that an array: in the file `registry` until 6.x, in `data.json` after. A
//! value of the `log` input and one of `filestream` differ; other inputs have no files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Identity, ImportError, Position, is_locked};

/// The version of a registry folder that is read here.
const VERSION: &str = "1";

/// What to do about a damaged registry.
const MEND: &str = "start Filebeat once and stop it again, which mends its registry";

/// All positions of files in a registry: of Filebeat's data folder, the registry itself, or a file
/// of it.
pub(super) fn read(path: &Path) -> Result<Vec<Position>, ImportError> {
    match locate(path)? {
        Form::Folder(folder) => {
            refuse_running(folder.ancestors().nth(2))?;
            read_folder(&folder)
        }
        Form::Array(file) => {
            refuse_running(file.parent())?;
            refuse_running(file.ancestors().nth(3))?;
            read_array(&file)
        }
    }
}

enum Form {
    Folder(PathBuf),
    Array(PathBuf),
}

fn locate(path: &Path) -> Result<Form, ImportError> {
    if path.is_file() {
        // Until 6.x the one file has no ending.
        let is_part = path.extension().is_some() && !path.ends_with("data.json");
        return Ok(match path.parent() {
            Some(folder) if is_part => Form::Folder(folder.to_owned()),
            _ => Form::Array(path.to_owned()),
        });
    }
    for folder in ["registry/filebeat", "filebeat", "."].map(|name| path.join(name)) {
        if folder.join("log.json").is_file() || newest_checkpoint(&folder)?.is_some() {
            return Ok(Form::Folder(folder.components().collect()));
        }
        if folder.join("data.json").is_file() {
            return Ok(Form::Array(folder.join("data.json")));
        }
    }
    if path.join("registry").is_file() {
        return Ok(Form::Array(path.join("registry")));
    }
    let reason = "no registry of Filebeat here: name its data folder (path.data), such as \
                  /var/lib/filebeat";
    Err(ImportError::registry(path, reason))
}

fn refuse_running(data: Option<&Path>) -> Result<(), ImportError> {
    let lock = data.map(|data| data.join("filebeat.lock"));
    match lock.filter(|lock| is_locked(lock)) {
        Some(lock) => Err(ImportError::Running { shipper: "Filebeat", lock }),
        None => Ok(()),
    }
}

/// The file `NUMBER.json` with the highest number.
fn newest_checkpoint(folder: &Path) -> Result<Option<(u64, PathBuf)>, ImportError> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(None) };
    let mut newest = None;
    for entry in entries {
        let entry = entry.map_err(|error| unreadable(folder, &error))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(".json")?.parse().ok());
        newest = newest.max(number.map(|number| (number, entry.path())));
    }
    Ok(newest)
}

#[derive(Deserialize)]
struct Meta {
    version: String,
}

#[derive(Deserialize)]
struct Action {
    op: String,
    id: u64,
}

#[derive(Deserialize)]
struct Operation {
    #[serde(alias = "K")]
    k: String,
    #[serde(alias = "V")]
    v: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Keyed {
    #[serde(rename = "_key")]
    key: String,
}

fn read_folder(folder: &Path) -> Result<Vec<Position>, ImportError> {
    let meta_file = folder.join("meta.json");
    let meta: Meta = parse(&meta_file, &slurp(&meta_file)?)?;
    if meta.version != VERSION {
        let reason = format!("version {:?} of the registry is not known here", meta.version);
        return Err(ImportError::registry(&meta_file, reason));
    }
    let mut values: BTreeMap<String, Box<RawValue>> = BTreeMap::new();
    let mut last = 0;
    if let Some((number, file)) = newest_checkpoint(folder)? {
        for value in parse::<Vec<Box<RawValue>>>(&file, &slurp(&file)?)? {
            let Keyed { key } = parse(&file, value.get().as_bytes())?;
            values.insert(key, value);
        }
        last = number;
    }
    let log = folder.join("log.json");
    if log.is_file() {
        replay(&log, last, &mut values)?;
    }
    let written = modified(&log).max(modified(&meta_file)).unwrap_or_else(SystemTime::now);
    let mut positions = Vec::new();
    for (key, value) in &values {
        let text = value.get().as_bytes();
        if key.starts_with("filebeat::logs::") {
            positions.extend(parse::<LogState>(folder, text)?.position(written));
        } else if let Some(key) = key.strip_prefix("filestream::") {
            positions.extend(parse::<FilestreamState>(folder, text)?.position(key, written));
        }
    }
    Ok(positions)
}

/// Applies the changes after `last`, each of which has the next number.
fn replay(
    log: &Path,
    mut last: u64,
    values: &mut BTreeMap<String, Box<RawValue>>,
) -> Result<(), ImportError> {
    let text = slurp(log)?;
    let mut documents = serde_json::Deserializer::from_slice(&text).into_iter::<Box<RawValue>>();
    while let Some(action) = documents.next() {
        let action: Action = decode(log, action)?;
        let Some(operation) = documents.next() else {
            return Err(damaged(log, "it ends within a change"));
        };
        let operation: Operation = decode(log, operation)?;
        if action.id <= last {
            // A checkpoint came after it, and a crash before the log was emptied.
            continue;
        }
        if action.id != last + 1 {
            return Err(damaged(log, &format!("change {} follows change {last}", action.id)));
        }
        last = action.id;
        match (action.op.as_str(), operation.v) {
            ("set", Some(value)) => {
                values.insert(operation.k, value);
            }
            ("remove", _) => {
                values.remove(&operation.k);
            }
            (name, _) => return Err(damaged(log, &format!("change {last} is {name:?}"))),
        }
    }
    Ok(())
}

fn read_array(file: &Path) -> Result<Vec<Position>, ImportError> {
    let written = modified(file).unwrap_or_else(SystemTime::now);
    let states: Vec<LogState> = parse(file, &slurp(file)?)?;
    Ok(states.into_iter().filter_map(|state| state.position(written)).collect())
}

/// What the `log` input keeps of a file.
#[derive(Deserialize)]
struct LogState {
    source: PathBuf,
    offset: u64,
    #[serde(default)]
    timestamp: Option<When>,
    #[serde(default = "for_ever")]
    ttl: i64,
    #[serde(default)]
    identifier_name: Option<String>,
    #[serde(rename = "FileStateOS", default)]
    file: Os,
}

#[derive(Default, Deserialize)]
struct Os {
    #[serde(default)]
    inode: u64,
    #[serde(default)]
    device: u64,
}

/// What `filestream` keeps of a file.
#[derive(Deserialize)]
struct FilestreamState {
    #[serde(default)]
    updated: Option<When>,
    #[serde(default = "for_ever")]
    ttl: i64,
    cursor: Option<Cursor>,
    meta: Option<FileMeta>,
}

#[derive(Deserialize)]
struct Cursor {
    offset: u64,
}

#[derive(Deserialize)]
struct FileMeta {
    #[serde(default)]
    source: Option<PathBuf>,
    #[serde(default)]
    identifier_name: Option<String>,
}

/// A time: RFC 3339, or nanoseconds (in the low 32 bits) and seconds.
#[derive(Deserialize)]
#[serde(untagged)]
enum When {
    Text(String),
    Numbers(u64, u64),
}

fn for_ever() -> i64 {
    -1
}

impl When {
    /// `None` for Go's zero time, which lies before 1970 and is written as a number beyond all times.
    fn time(&self) -> Option<SystemTime> {
        match self {
            When::Text(text) => Some(text.parse::<Timestamp>().ok()?.into()),
            When::Numbers(nanoseconds, seconds) => {
                let nanoseconds = Duration::from_nanos(nanoseconds & 0xffff_ffff);
                UNIX_EPOCH.checked_add(Duration::from_secs(*seconds))?.checked_add(nanoseconds)
            }
        }
    }
}

impl LogState {
    /// `None` where the state is on its way out.
    fn position(self, written: SystemTime) -> Option<Position> {
        let identity = match self.identifier_name.as_deref() {
            None | Some("native") => {
                Identity::Inode { inode: self.file.inode, devices: vec![self.file.device] }
            }
            // The marker file's text stands for the device.
            Some("inode_marker") => Identity::Inode { inode: self.file.inode, devices: Vec::new() },
            Some("path") => Identity::Path,
            Some(other) => Identity::Unknown(other.to_owned()),
        };
        (self.ttl != 0).then(|| Position {
            path: Some(self.source),
            identity,
            offset: self.offset,
            changed: self.timestamp.and_then(|when| when.time()).unwrap_or(written),
            // So Filebeat marks, when it starts, what no input has claimed yet.
            stale: self.ttl == -2,
            counts_stored: false,
        })
    }
}

impl FilestreamState {
    /// `key` is `INPUT::IDENTITY::…`. `None` where the state is on its way out.
    fn position(self, key: &str, written: SystemTime) -> Option<Position> {
        let meta = self.meta?;
        let name = meta.identifier_name.as_deref().unwrap_or("native");
        // The input's id may hold anything; what the identity is stands behind its name.
        let value = key.rfind(&format!("::{name}::")).map(|at| &key[at + name.len() + 4..]);
        let identity = match (name, value) {
            ("path", _) => Identity::Path,
            ("native", Some(value)) => {
                // INODE-DEVICE, and for containers -STREAM.
                let mut numbers = value.split('-').map(|number| number.parse().ok());
                match (numbers.next().flatten(), numbers.next().flatten()) {
                    (Some(inode), Some(device)) => Identity::Inode { inode, devices: vec![device] },
                    _ => Identity::Unknown(value.to_owned()),
                }
            }
            ("inode_marker", Some(value)) => {
                match value.split('-').next().and_then(|inode| inode.parse().ok()) {
                    Some(inode) => Identity::Inode { inode, devices: Vec::new() },
                    None => Identity::Unknown(value.to_owned()),
                }
            }
            ("fingerprint", Some(value)) => {
                Identity::Content(value.get(..64).unwrap_or(value).to_owned())
            }
            _ => Identity::Unknown(name.to_owned()),
        };
        let updated = self.updated.and_then(|when| when.time());
        (self.ttl != 0 || updated.is_none()).then(|| Position {
            path: meta.source,
            identity,
            // Without a cursor it was seen, and nothing of it was sent.
            offset: self.cursor.map_or(0, |cursor| cursor.offset),
            changed: updated.unwrap_or(written),
            stale: false,
            counts_stored: false,
        })
    }
}

fn slurp(file: &Path) -> Result<Vec<u8>, ImportError> {
    fs::read(file).map_err(|error| unreadable(file, &error))
}

fn unreadable(file: &Path, error: &std::io::Error) -> ImportError {
    ImportError::registry(file, format!("cannot be read: {error}"))
}

fn damaged(file: &Path, what: &str) -> ImportError {
    ImportError::registry(file, format!("is damaged: {what}; {MEND}"))
}

fn parse<'a, T: Deserialize<'a>>(file: &Path, text: &'a [u8]) -> Result<T, ImportError> {
    serde_json::from_slice(text).map_err(|error| damaged(file, &error.to_string()))
}

fn decode<T: for<'a> Deserialize<'a>>(
    file: &Path,
    value: serde_json::Result<Box<RawValue>>,
) -> Result<T, ImportError> {
    let value = value.map_err(|error| damaged(file, &error.to_string()))?;
    parse(file, value.get().as_bytes())
}

fn modified(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|metadata| metadata.modified()).ok()
}

#[cfg(test)]
mod tests;
