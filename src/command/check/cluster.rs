//! Elasticsearch, as a receiver meets it.

use std::io;

use jiff::Timestamp;

use super::{Report, Status};
use crate::clock::http_date;
use crate::config::{ElasticsearchAuth, ElasticsearchConfig};
use crate::destination::elasticsearch::{Cluster, Privileges, RequestError, Template, supported};
use crate::record::{Day, IndexRule, TypeName};
use crate::tls::Leaf;

/// Indices that a line names; the rest is counted.
const NAMED_MAX: usize = 3;

/// Each URL, then what is the whole cluster's, where one of them answers.
pub(super) async fn check(
    report: &mut Report,
    config: &ElasticsearchConfig,
    rule: &IndexRule,
) -> io::Result<()> {
    let cluster = match Cluster::new(config, rule) {
        Ok(cluster) => cluster,
        Err(error) => return report.fail("elasticsearch", None, error.to_string()),
    };
    let mut answers = false;
    for number in 0..cluster.urls().len() {
        answers |= node(report, &cluster, number).await?;
    }
    if !answers {
        return Ok(());
    }
    privileges(report, &cluster, &config.auth).await?;
    templates(report, &cluster).await?;
    durability(report, &cluster, rule).await
}

/// Whether it answers, and takes our key.
async fn node(report: &mut Report, cluster: &Cluster, number: usize) -> io::Result<bool> {
    let of = Some(cluster.urls()[number].as_str());
    let node = match cluster.node(number).await {
        Ok(node) => node,
        Err(error) => {
            let message = format!("{error}; is the URL right, and the port open?");
            report.fail("connection", of, message)?;
            return Ok(false);
        }
    };
    report.ok("connection", of, "answered")?;
    if let Some(certificate) = &node.certificate {
        report.certificate("tls", of, Leaf::from_der(certificate))?;
    }
    match &node.version {
        Ok(version) => match supported(version) {
            Ok(()) => report.ok("version", of, version)?,
            Err(error) => report.fail("version", of, error.to_string())?,
        },
        Err(error) if error.status() == Some(401) => {
            let message = format!("{error}; the key is unknown or has ended: give another");
            report.fail("credentials", of, message)?;
            return Ok(false);
        }
        Err(error) => not_checked(report, "version", of, error, "monitor")?,
    }
    match node.date.as_deref().and_then(http_date) {
        Some(date) => report.clock(of, "Elasticsearch's", date)?,
        None => match cluster.time().await {
            Ok(time) => {
                let time =
                    i64::try_from(time).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
                report.clock(of, "Elasticsearch's", time.unwrap_or_default())?;
            }
            Err(error) => not_checked(report, "clock", of, &error, "monitor")?,
        },
    }
    Ok(true)
}

async fn privileges(
    report: &mut Report,
    cluster: &Cluster,
    auth: &ElasticsearchAuth,
) -> io::Result<()> {
    const CHECK: &str = "privileges";
    match cluster.privileges().await {
        Ok(Privileges::Enough) => {
            report.ok(CHECK, None, "the key may write lines and dead letters")
        }
        Ok(Privileges::Missing(missing)) => {
            let message = format!("the key lacks {}: grant it", missing.join(", "));
            report.fail(CHECK, None, message)
        }
        Ok(Privileges::Unknown) if *auth == ElasticsearchAuth::None => {
            report.skip(CHECK, None, "not checked: this cluster has no users to ask about")
        }
        Ok(Privileges::Unknown) => {
            let message = "not checked: this cluster cannot be asked what a key may do";
            report.skip(CHECK, None, message)
        }
        Err(error) => not_checked(report, CHECK, None, &error, "an API key or a user"),
    }
}

async fn templates(report: &mut Report, cluster: &Cluster) -> io::Result<()> {
    const CHECK: &str = "template";
    let templates = match cluster.templates().await {
        Ok(templates) => templates,
        Err(error) => return not_checked(report, CHECK, None, &error, "manage_index_templates"),
    };
    for (name, template) in templates {
        let (status, message) = match template {
            Template::Current(version) => (Status::Ok, format!("version {version}")),
            Template::Other { version, ours } => {
                let theirs = version.map_or("no version".to_owned(), |v| format!("version {v}"));
                let message =
                    format!("{theirs} is there, and this program makes {ours}: waybill setup");
                (Status::Warn, message)
            }
            Template::Elsewhere { covers, wanted } => {
                let covers = covers.join(", ");
                let message = format!("it covers {covers}, not {wanted}: waybill setup --index");
                (Status::Fail, message)
            }
            Template::Absent => {
                let message = "it is missing, and fields of lines get whatever type they look like: \
                               waybill setup";
                (Status::Fail, message.to_owned())
            }
        };
        report.line(CHECK, Some(&name), status, message)?;
    }
    Ok(())
}

/// A receipt stands for a line on disk: `index.translog.durability` is `request` (I1).
async fn durability(report: &mut Report, cluster: &Cluster, rule: &IndexRule) -> io::Result<()> {
    const CHECK: &str = "durability";
    const PROMISE: &str = "a receipt would promise what a power cut takes back";
    let type_name: TypeName = "default".parse().expect("a type's name");
    let next = rule.name(&type_name, Day::today());
    match cluster.next_is_asynchronous(&next).await {
        Ok(false) => {
            report.ok(CHECK, Some("new indices"), "index.translog.durability is request")?
        }
        Ok(true) => {
            let message = format!(
                "a template makes index.translog.durability async, and {PROMISE}: take it out, or \
                 run waybill setup"
            );
            report.fail(CHECK, Some("new indices"), message)?;
        }
        Err(error) => {
            not_checked(report, CHECK, Some("new indices"), &error, "manage_index_templates")?;
        }
    }
    match cluster.asynchronous().await {
        Ok(indices) if indices.is_empty() => {
            report.ok(CHECK, Some("indices"), "index.translog.durability is request")
        }
        Ok(indices) => {
            let named = indices.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(",");
            let message = format!(
                "{} have index.translog.durability async, such as {named}, and {PROMISE}: \
                 PUT /{named}/_settings {{\"index.translog.durability\":\"request\"}}",
                indices.len()
            );
            report.fail(CHECK, Some("indices"), message)
        }
        Err(error) => not_checked(report, CHECK, Some("indices"), &error, "view_index_metadata"),
    }
}

/// A key that may only write is as it should be: most questions are above its rights.
fn not_checked(
    report: &mut Report,
    check: &str,
    of: Option<&str>,
    error: &RequestError,
    needs: &str,
) -> io::Result<()> {
    match error.status() {
        Some(401 | 403) => {
            report.skip(check, of, format!("not checked: that needs {needs}, which this key lacks"))
        }
        _ => report.skip(check, of, format!("not checked: {error}")),
    }
}
