//! Finds one document by index and id, beside the writer: whose it is.

use std::path::{Path, PathBuf};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rusqlite::OptionalExtension as _;
use thiserror::Error;
use uuid::Uuid;

use super::OpenError;
use super::elasticsearch::{Client, RequestError};
use super::embedded::{StoreError, open_reader};
use crate::config::DestinationConfig;
use crate::record::{DocumentId, SenderId};

/// How a destination is read.
#[derive(Debug)]
pub enum Lookup {
    /// With the key that writes, if that may read too.
    Elasticsearch(Box<Client>),
    /// The store's file.
    Embedded(PathBuf),
}

/// What a lookup found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// The document of this sender.
    Of(SenderId),
    /// No such document.
    Nothing,
}

/// Why nothing is known.
#[derive(Debug, Error)]
pub enum LookupError {
    /// Elasticsearch does not say: as a rule because the key may only write.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The document has no sender.
    #[error("the answer names no sender")]
    NoSender,
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The reading thread failed.
    #[error(transparent)]
    Task(#[from] tokio::task::JoinError),
}

impl Lookup {
    /// Connects to nothing yet.
    pub fn new(config: &DestinationConfig) -> Result<Lookup, OpenError> {
        Ok(match config {
            DestinationConfig::Elasticsearch(config) => {
                Lookup::Elasticsearch(Box::new(Client::new(config)?))
            }
            DestinationConfig::Embedded(config) => Lookup::Embedded(config.file.clone()),
        })
    }

    /// Whose document has this id in this index; the index is outside text.
    pub async fn sender_of(&self, index: &str, id: &DocumentId) -> Result<Found, LookupError> {
        match self {
            Lookup::Elasticsearch(client) => in_elasticsearch(client, index, id).await,
            Lookup::Embedded(file) => {
                let (file, index, id) = (file.clone(), index.to_owned(), *id);
                let read = move || in_store(&file, &index, &id);
                Ok(tokio::task::spawn_blocking(read).await??)
            }
        }
    }
}

/// By id, which does not wait for a refresh.
async fn in_elasticsearch(
    client: &Client,
    index: &str,
    id: &DocumentId,
) -> Result<Found, LookupError> {
    let index = utf8_percent_encode(index, NON_ALPHANUMERIC);
    let path = format!("/{index}/_doc/{id}?_source_includes=waybill.sender");
    let answer = match client.get(&path).await {
        Err(error) if error.status() == Some(404) => return Ok(Found::Nothing),
        answer => answer?,
    };
    let sender = answer["_source"]["waybill"]["sender"].as_str();
    let sender = sender.and_then(|text| Uuid::parse_str(text).ok());
    sender.map(|sender| Found::Of(SenderId(sender))).ok_or(LookupError::NoSender)
}

fn in_store(file: &Path, index: &str, id: &DocumentId) -> Result<Found, StoreError> {
    let connection = open_reader(file)?;
    let statement = "SELECT s.sender FROM lines AS l JOIN segments AS s ON s.number = l.segment \
                     WHERE l.id = ?1 AND s.index_name = ?2";
    let found: Option<Vec<u8>> = connection
        .query_row(statement, (id.0, index), |row| row.get(0))
        .optional()
        .map_err(|source| StoreError::of(file, source))?;
    let sender = found.and_then(|bytes| Uuid::from_slice(&bytes).ok());
    Ok(sender.map_or(Found::Nothing, |sender| Found::Of(SenderId(sender))))
}
