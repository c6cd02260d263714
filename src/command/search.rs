//! `waybill search`: finds lines in the embedded store or in Elasticsearch.
//!
//! Hits go to standard output, oldest first, so that the newest stands last as in a log; how many
//! there are goes to standard error.

use std::io::{self, Write};

use anyhow::Context;
use jiff::Timestamp;
use serde_json::Value;

use crate::config::ElasticsearchConfig;
use crate::destination::elasticsearch::Client;
use crate::exit::Exit;
use crate::search::elasticsearch::{from_elasticsearch, to_elasticsearch};
use crate::search::{Answer, Query, QueryError, SearchArgs, SearchTarget, embedded, render};
use crate::telemetry;

/// Searches and prints. As with grep, nothing found is [`Exit::Failed`], so that a script can tell;
/// a query that cannot be read is [`Exit::Usage`].
pub async fn run(args: SearchArgs) -> anyhow::Result<Exit> {
    let ask = async |config: &ElasticsearchConfig, index: &str, body: Value| {
        Ok(Client::new(config)?.search(index, body).await?)
    };
    match run_with(args, ask).await {
        Err(error) if error.is::<QueryError>() => {
            telemetry::report(&error.to_string());
            Ok(Exit::Usage)
        }
        result => result,
    }
}

/// `ask` sends a body to `_search` of the indices that it is given and returns the response.
async fn run_with(
    args: SearchArgs,
    ask: impl AsyncFnOnce(&ElasticsearchConfig, &str, Value) -> anyhow::Result<Value>,
) -> anyhow::Result<Exit> {
    let query = Query::new(&args, Timestamp::now())?;
    let limit = args.limit;
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
    print(&answer, limit, args.json).context("cannot write the lines found")?;
    Ok(if answer.hits.is_empty() { Exit::Failed } else { Exit::Done })
}

fn print(answer: &Answer, limit: usize, json: bool) -> io::Result<()> {
    if json {
        let mut out = io::BufWriter::new(io::stdout().lock());
        render::write_json(&answer.hits, &mut out)?;
        out.flush()?;
    } else {
        let mut out = io::BufWriter::new(anstream::stdout().lock());
        render::write_lines(&answer.hits, &mut out)?;
        out.flush()?;
    }
    writeln!(anstream::stderr(), "{}", render::summary(answer, limit))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use crate::config::ElasticsearchAuth;
    use crate::destination::embedded::StoreError;

    use super::*;

    fn args(query: &str, target: SearchTarget) -> SearchArgs {
        SearchArgs {
            query: query.to_owned(),
            after: None,
            before: None,
            limit: 3,
            json: true,
            target,
        }
    }

    async fn unasked(_: &ElasticsearchConfig, _: &str, _: Value) -> anyhow::Result<Value> {
        panic!("elasticsearch was asked")
    }

    #[tokio::test]
    async fn elasticsearch_is_asked_for_the_indices_and_an_empty_answer_is_no_success() {
        let config = ElasticsearchConfig {
            urls: vec!["http://localhost:9200".to_owned()],
            auth: ElasticsearchAuth::None,
            ca: None,
            batch_bytes_max: 1,
            requests: 1,
            dead_letter_index: "waybill-dead".to_owned(),
        };
        let target = SearchTarget::Elasticsearch { config, index: "waybill-*".to_owned() };
        let outcome = run_with(args("word", target), async |_, index: &str, body: Value| {
            assert_eq!((index, &body["size"]), ("waybill-*", &json!(3)));
            Ok(json!({ "hits": { "total": { "value": 0, "relation": "eq" }, "hits": [] } }))
        });
        assert_eq!(outcome.await.expect("a search"), Exit::Failed);
    }

    #[tokio::test]
    async fn errors_keep_their_kind_for_the_exit_code() {
        let missing = || SearchTarget::Store(PathBuf::from("/nonexistent/store"));
        let error = run_with(args("\"open", missing()), unasked).await.expect_err("bad syntax");
        assert!(error.is::<QueryError>(), "{error}");
        let error = run_with(args("word", missing()), unasked).await.expect_err("no store");
        assert!(matches!(error.downcast_ref(), Some(StoreError::Missing(_))), "{error}");
        let exit = run(args("\"open", missing())).await.expect("told already");
        assert_eq!(exit, Exit::Usage);
    }
}
