//! `waybill search`: finds lines in the embedded store or in Elasticsearch.
//!
//! Hits go to standard output, oldest first, so that the newest stands last as in a log; how many
//! there are goes to standard error.

use std::io::{self, Write};

use anyhow::Context;
use jiff::Timestamp;
use serde_json::Value;

use crate::config::ElasticsearchConfig;
use crate::search::elasticsearch::{from_elasticsearch, to_elasticsearch};
use crate::search::{Answer, Query, SearchArgs, SearchTarget, embedded, render};

/// What a search came to, for the exit code: as with grep, nothing found is not a success.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// At least one line was found: 0.
    Found,
    /// None was: 1.
    NothingFound,
}

/// Searches and prints. `ask` sends a body to `_search` of the indices that it is given and returns
/// the response. A [`crate::search::QueryError`] is a usage error; everything else is a failure.
pub async fn run(
    args: SearchArgs,
    ask: impl AsyncFnOnce(&ElasticsearchConfig, &str, Value) -> anyhow::Result<Value>,
) -> anyhow::Result<Outcome> {
    let query = Query::new(&args, Timestamp::now())?;
    let answer = match args.target {
        SearchTarget::Store(path) => {
            tokio::task::spawn_blocking(move || embedded::search(&path, &query))
                .await
                .context("the search ended early")??
        }
        SearchTarget::Elasticsearch { config, index } => {
            let body = to_elasticsearch(&query)?;
            from_elasticsearch(&ask(&config, &index, body).await?)?
        }
    };
    match print(&answer, args.json) {
        // Whoever reads has seen enough (`| head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed.context("cannot write the lines found")?,
    }
    let found = !answer.hits.is_empty();
    Ok(if found { Outcome::Found } else { Outcome::NothingFound })
}

fn print(answer: &Answer, json: bool) -> io::Result<()> {
    if json {
        let mut out = io::BufWriter::new(io::stdout().lock());
        render::write_json(&answer.hits, &mut out)?;
        out.flush()?;
    } else {
        let mut out = io::BufWriter::new(anstream::stdout().lock());
        render::write_lines(&answer.hits, &mut out)?;
        out.flush()?;
    }
    writeln!(anstream::stderr(), "{}", render::summary(answer))
}
