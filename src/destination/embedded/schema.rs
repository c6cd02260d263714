//! What a store file looks like, and how it is opened: by the one writer and by any reader.
//!
//! A file that is no store, or a newer one, is never written to: the error says what to do.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use thiserror::Error;
use tracing::info;
use uuid::Uuid;

use crate::record::escape_path;

/// `application_id` in the file's header: "Wybl". `file` and we tell a store by it.
const APPLICATION_ID: i32 = 0x5779_626c;

/// `user_version` in the file's header; it grows with every change of [`SCHEMA`].
const SCHEMA_VERSION: i32 = 2;

/// How long a statement waits for another process's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// The writer's page cache in KiB: it holds what one transaction changes in the indices. The rest
/// of the receiver's memory belongs to its frames.
const WRITER_CACHE_KIB: i64 = 16 << 10;

/// Pages in the write-ahead log before they are copied into the file (32 MiB): the pages of the
/// indices change with every transaction and are copied once for many of them.
const CHECKPOINT_PAGES: i64 = 4096;

/// Memory for the words of one transaction before they go to the index, in bytes. Measured: 8 %
/// fewer CPU seconds than SQLite's default of 1 MiB; twice as much gains 2 % more.
const WORDS_BYTES: i64 = 4 << 20;

/// Size to which the write-ahead log is cut after it was copied, in bytes; a long search may have
/// made it grow.
const LOG_BYTES_MAX: i64 = 64 << 20;

/// The tables.
///
/// `lines.line` counts lines as they arrive and is the row id of `words`, which keeps no text of
/// its own: a hit's text is in its document. An id may be there once per index, which its segment
/// names. `arrived` is this machine's clock, in milliseconds since 1970: what a line says of itself
/// does not decide how long it or others are kept. `segments` holds once what thousands of lines
/// share; its `newest`, the highest number of a line, tells retention when the last of them is gone.
const SCHEMA: &str = "
    CREATE TABLE meta (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE segments (
        number INTEGER PRIMARY KEY,
        segment BLOB NOT NULL,
        sender BLOB NOT NULL,
        index_name TEXT NOT NULL,
        newest INTEGER NOT NULL,
        UNIQUE (segment, sender, index_name)
    ) STRICT;
    CREATE TABLE lines (
        line INTEGER PRIMARY KEY,
        id BLOB NOT NULL,
        time INTEGER NOT NULL,
        arrived INTEGER NOT NULL,
        segment INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        document TEXT NOT NULL
    ) STRICT;
    CREATE INDEX lines_id ON lines (id);
    CREATE INDEX lines_time ON lines (time);
    CREATE VIRTUAL TABLE words USING fts5 (
        line, content = '', contentless_delete = 1, tokenize = 'unicode61'
    );
    CREATE TABLE parked (
        id BLOB PRIMARY KEY,
        reason TEXT NOT NULL,
        arrived INTEGER NOT NULL,
        sender BLOB NOT NULL,
        source TEXT NOT NULL,
        path TEXT NOT NULL,
        offset INTEGER NOT NULL,
        line BLOB NOT NULL
    ) STRICT;
";

/// Why a store cannot be opened or used.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Its folder or file cannot be made.
    #[error(
        "cannot make the store {}: {source}; check that its folder exists and is writable",
        path.display()
    )]
    Create {
        /// The store's file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A search was asked of a file that is not there.
    #[error("there is no store at {}; name the one that `waybill receive` writes with --store", .0.display())]
    Missing(PathBuf),
    /// The file holds something else.
    #[error("{} is not a Waybill store; nothing was written to it, choose another file", .0.display())]
    NotAStore(PathBuf),
    /// The path is a folder's.
    #[error("{} is a folder; name the store's file in it", .0.display())]
    Folder(PathBuf),
    /// A newer Waybill made it.
    #[error(
        "the store {} has format {found}, this version knows up to {SCHEMA_VERSION}; \
         use a newer waybill",
        path.display()
    )]
    Newer {
        /// The store's file.
        path: PathBuf,
        /// Its format's number.
        found: i32,
    },
    /// A Waybill from before the first release made it.
    #[error(
        "the store {} has format {found}, this version writes {SCHEMA_VERSION}; move the file and \
         its -wal and -shm away and start again with a new one, or use the waybill that made it",
        path.display()
    )]
    Older {
        /// The store's file.
        path: PathBuf,
        /// Its format's number.
        found: i32,
    },
    /// Its pages contradict each other.
    #[error(
        "the store {} is damaged ({source}); stop waybill, move the file and its -wal and -shm \
         away, and start again with a new one; what can be saved comes out with \
         `sqlite3 FILE .recover`",
        path.display()
    )]
    Damaged {
        /// The store's file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// Anything else that SQLite reports: permissions, locks, input and output.
    #[error(
        "the store {} cannot be used: {source}; check its disk, permissions and other users",
        path.display()
    )]
    Sqlite {
        /// The store's file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
}

impl StoreError {
    /// Sorts what SQLite said about the store at `path` by what a person has to do.
    pub fn of(path: &Path, source: rusqlite::Error) -> StoreError {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => StoreError::NotAStore(path),
            Some(ErrorCode::DatabaseCorrupt) => StoreError::Damaged { path, source },
            _ => StoreError::Sqlite { path, source },
        }
    }

    /// Whether the file must be another, or the program: trying again does not help.
    pub fn is_of_another_kind(&self) -> bool {
        use StoreError::{Folder, Newer, NotAStore, Older};
        matches!(self, NotAStore(_) | Folder(_) | Newer { .. } | Older { .. })
    }
}

/// Opens a store for writing, makes it where it is missing, and reads its destination id.
pub(super) fn open_writer(path: &Path) -> Result<(Connection, Uuid), StoreError> {
    refuse_folder(path)?;
    create_file(path).map_err(|source| StoreError::Create { path: path.to_owned(), source })?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection =
        Connection::open_with_flags(path, flags).map_err(|source| StoreError::of(path, source))?;
    prepare_writer(&mut connection, path)
        .and_then(|()| destination_id(&connection, path))
        .map(|id| (connection, id))
}

/// Opens a store for searching, beside a writer or without one.
pub fn open_reader(path: &Path) -> Result<Connection, StoreError> {
    if !path.exists() {
        return Err(StoreError::Missing(path.to_owned()));
    }
    refuse_folder(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection =
        Connection::open_with_flags(path, flags).map_err(|source| StoreError::of(path, source))?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(|source| StoreError::of(path, source))?;
    match kind(&connection, path)? {
        Kind::Store => Ok(connection),
        Kind::Empty => Err(StoreError::NotAStore(path.to_owned())),
    }
}

/// Whether the file at `path`, where there is one, is a store or can become one. Makes nothing, and
/// changes nothing.
///
/// # Errors
///
/// What the writer would fail with.
pub fn look(path: &Path) -> Result<(), StoreError> {
    if !path.exists() {
        return Ok(());
    }
    refuse_folder(path)?;
    // Where a log lies beside the file, both count. Else SQLite would make one to read by.
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    let mut uri = format!("file:{}", percent_encode(path.as_os_str().as_bytes(), NON_ALPHANUMERIC));
    if !Path::new(&log).exists() {
        uri += "?immutable=1";
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(uri, flags);
    kind(&connection.map_err(|source| StoreError::of(path, source))?, path).map(drop)
}

fn refuse_folder(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() { Err(StoreError::Folder(path.to_owned())) } else { Ok(()) }
}

/// Makes the folder and an empty file that only its owner writes and its group reads: log lines
/// are nobody else's business. SQLite gives its log the same permissions.
fn create_file(path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        create_folder(folder)?;
    }
    match OpenOptions::new().append(true).create_new(true).mode(0o640).open(path) {
        // A path that was mistyped shows here.
        Ok(_) => info!(store = %escape_path(path), "created: there was no store here"),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            OpenOptions::new().append(true).open(path)?;
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Makes a folder and those above it, each durably: a store whose folder is gone after a power cut
/// would have receipted lines that nobody has (I1).
fn create_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent().filter(|above| !above.as_os_str().is_empty());
    if let Some(above) = above {
        create_folder(above)?;
    }
    match DirBuilder::new().mode(0o750).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
        made => made?,
    }
    File::open(above.unwrap_or(Path::new(".")))?.sync_all()
}

enum Kind {
    Empty,
    Store,
}

/// Tells a store from an empty file and from everything else, by reading alone.
fn kind(connection: &Connection, path: &Path) -> Result<Kind, StoreError> {
    let read = || -> rusqlite::Result<(i32, i32, i64)> {
        let application = connection.pragma_query_value(None, "application_id", |r| r.get(0))?;
        let version = connection.pragma_query_value(None, "user_version", |r| r.get(0))?;
        let objects = "SELECT count(*) FROM sqlite_schema";
        Ok((application, version, connection.query_row(objects, [], |row| row.get(0))?))
    };
    match read().map_err(|source| StoreError::of(path, source))? {
        (APPLICATION_ID, found, _) if found > SCHEMA_VERSION => {
            Err(StoreError::Newer { path: path.to_owned(), found })
        }
        (APPLICATION_ID, found, _) if found < SCHEMA_VERSION => {
            Err(StoreError::Older { path: path.to_owned(), found })
        }
        (APPLICATION_ID, _, _) => Ok(Kind::Store),
        (0, 0, 0) => Ok(Kind::Empty),
        _ => Err(StoreError::NotAStore(path.to_owned())),
    }
}

fn prepare_writer(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let sqlite = |source| StoreError::of(path, source);
    connection.busy_timeout(BUSY_TIMEOUT).map_err(sqlite)?;
    // Before the first write: the file may be somebody else's.
    let kind = kind(connection, path)?;
    configure(connection, matches!(kind, Kind::Empty)).map_err(sqlite)?;
    if let Kind::Empty = kind {
        create_schema(connection, path)?;
    }
    probe(connection).map_err(sqlite)
}

fn configure(connection: &Connection, empty: bool) -> rusqlite::Result<()> {
    if empty {
        // Documents of half a kilobyte fill pages of this size well.
        connection.pragma_update(None, "page_size", 8192)?;
    }
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        tracing::warn!(
            mode,
            "the store's file system has no shared memory: searches wait for writes"
        );
    }
    // FULL: a commit is on the disk when it returns, which is what a receipt says (I1).
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    connection.pragma_update(None, "journal_size_limit", LOG_BYTES_MAX)
}

/// Makes tables and destination id in one transaction, so that a killed start leaves an empty file.
fn create_schema(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let sqlite = |source| StoreError::of(path, source);
    let transaction =
        connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(sqlite)?;
    // Another process may have been quicker.
    if let Kind::Store = kind(&transaction, path)? {
        return Ok(());
    }
    let create = || -> rusqlite::Result<()> {
        transaction.execute_batch(SCHEMA)?;
        let words = "INSERT INTO words (words, rank) VALUES ('hashsize', ?1)";
        transaction.execute(words, [WORDS_BYTES])?;
        let id = Uuid::now_v7().to_string();
        transaction.execute("INSERT INTO meta VALUES ('destination_id', ?1)", [id])?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)
    };
    create().and_then(|()| transaction.commit()).map_err(sqlite)
}

/// Touches both ends of every tree that the next insert touches, so that damage shows at the start
/// and not at the first line.
fn probe(connection: &Connection) -> rusqlite::Result<()> {
    for statement in [
        "SELECT min(line), max(line) FROM lines",
        "SELECT min(id), max(id) FROM lines",
        "SELECT min(time), max(time) FROM lines",
        "SELECT max(number) FROM segments",
        "SELECT max(id) FROM parked",
        "SELECT max(rowid) FROM (SELECT rowid FROM words WHERE words MATCH '\"waybill\"' LIMIT 1)",
    ] {
        connection.query_row(statement, [], |_| Ok(()))?;
    }
    Ok(())
}

fn destination_id(connection: &Connection, path: &Path) -> Result<Uuid, StoreError> {
    let statement = "SELECT value FROM meta WHERE name = 'destination_id'";
    let text: String = connection
        .query_row(statement, [], |row| row.get(0))
        .map_err(|source| StoreError::of(path, source))?;
    Uuid::parse_str(&text).map_err(|_| StoreError::NotAStore(path.to_owned()))
}
