//! Every rule for answers, each with a server that gives the answer.

use std::collections::HashMap;

use super::*;
use crate::record::framing::encode_spool_record;

#[tokio::test]
async fn lines_are_stored_under_their_ids_and_empty_ones_skipped() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), "one\n\n\ntwo\n");
    let ids = [sent.id(0), sent.id(3)];
    use Verdict::{Skipped, Stored};
    assert_eq!(sent.verdicts().await, [Stored, Skipped, Skipped, Stored]);
    let health = bench.health.clone();
    bench.end().await;
    assert_eq!(*health.borrow(), Health::Ready);
    let bulks = server.bulks();
    assert_eq!(bulks.len(), 1);
    let documents = bulks[0].documents();
    assert_eq!(documents, ids.map(|id| ("a".to_owned(), id)));
    assert!(bulks[0].headers.contains("content-type: application/x-ndjson\r\n"));
    assert!(bulks[0].line.ends_with(" HTTP/1.1"));
}

#[tokio::test]
async fn a_conflict_is_created_again_behind_a_flush_while_others_go_on() {
    let mut met = false;
    let server = Server::start(move |request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "a" if !std::mem::replace(&mut met, true) => {
                error(index, 409, "version_conflict_engine_exception")
            }
            "a" if request.documents().len() == 1 => {
                error(index, 409, "version_conflict_engine_exception")
            }
            _ => created(index),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let mut sent = bench.send(&lines("a"), "known\nnew\n");
    sent.answered(4).await;
    assert_eq!(sent.seen, [(1006, 1010, 1, Verdict::Stored)], "its neighbour does not wait");
    assert_eq!(bench.send(&lines("b"), "x\n").verdicts().await, [Verdict::Stored]);
    assert_eq!(sent.verdicts().await, [Verdict::Already, Verdict::Stored]);
    bench.end().await;
    let bulks = server.bulks();
    let last = bulks.last().expect("a second create");
    assert_eq!(last.documents().len(), 1, "only what met a conflict is created again");
    assert!(last.at - bulks[0].at >= PAUSE);
    assert_eq!(server.saw("POST /a/_flush"), 1);
    assert_eq!(CONFLICT_PAUSE, Duration::from_secs(2));
}

#[tokio::test]
async fn a_busy_document_alone_is_sent_again() {
    let mut tries = HashMap::<String, u32>::new();
    let server = Server::start(move |request| match request.is_bulk() {
        true => items(request, |index, id| {
            let tries = tries.entry(id.to_owned()).or_default();
            *tries += 1;
            match (request.documents().len(), *tries) {
                (3, 1) if id == request.documents()[1].1 => error(index, 429, "es_rejected"),
                (1, 2) => error(index, 503, "node_not_connected"),
                _ => created(index),
            }
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), "1\n2\n3\n");
    let id = sent.id(1);
    assert_eq!(sent.verdicts().await, vec![Verdict::Stored; 3]);
    bench.end().await;
    let bulks: Vec<_> = server.bulks().iter().map(Request::documents).collect();
    let alone = vec![("a".to_owned(), id)];
    assert_eq!(bulks[1..], [alone.clone(), alone]);
}

#[tokio::test]
async fn a_cluster_with_too_much_to_do_gives_lines_back_and_no_index_is_named() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| error(index, 429, "es_rejected_execution_exception")),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("a"), "1\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], "es_rejected_execution_exception"), "{verdicts:?}");
    assert_eq!(refused_by(&verdicts[0]), None);
    bench.end().await;
}

#[tokio::test]
async fn a_refused_line_is_reduced_then_parked_in_pieces_and_neighbours_are_stored() {
    let long = "é".repeat(200 << 10);
    let server = Server::start(move |request| match request.is_bulk() {
        true => items(request, |index, id| match index {
            "a" if id == request.documents()[request.documents().len() / 2].1 => {
                error(index, 400, "mapper_parsing_exception")
            }
            _ => created(index),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), format!("1\n{long}\n3\n"));
    let id = sent.id(1);
    let verdicts = sent.verdicts().await;
    assert_eq!((&verdicts[0], &verdicts[2]), (&Verdict::Stored, &Verdict::Stored));
    assert!(is_parked(&verdicts[1], "mapper_parsing_exception: because"), "{:?}", verdicts[1]);
    bench.end().await;
    let bulks = server.bulks();
    assert_eq!(bulks.len(), 3, "full, reduced, dead letter");
    assert_eq!(bulks[1].documents(), [("a".to_owned(), id.clone())]);
    let letters = bulks[2].documents();
    assert_eq!(letters.len(), 2);
    assert_eq!(letters[0], ("dead".to_owned(), id.clone()), "under the line's own id");
    assert_ne!(letters[1].1, id);
    let sources = bulks[2].sources();
    let line: String =
        sources.iter().map(|letter| letter["line"].as_str().expect("line")).collect();
    assert_eq!(line, long);
    assert_eq!(sources[1]["piece"], 1);
    assert_eq!(sources[0]["offset"], 1002);
    assert_eq!(sources[0]["path"], "/var/log/app.log");
}

#[tokio::test]
async fn a_line_refused_alone_is_deferred_until_its_index_has_taken_another() {
    let mut bad = String::new();
    let server = Server::start(move |request| match request.is_bulk() {
        true => items(request, |index, id| {
            if bad.is_empty() {
                bad = id.to_owned();
            }
            match index {
                "a" if id == bad => error(index, 400, "mapper_parsing_exception"),
                _ => created(index),
            }
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let segment = lines("a");
    let verdicts = bench.send(&segment, "bad\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], "mapper_parsing_exception"), "{verdicts:?}");
    assert_eq!(refused_by(&verdicts[0]), Some("a"));
    assert_eq!(bench.send(&lines("a"), "good\n").verdicts().await, [Verdict::Stored]);
    // The same line again, with nothing stored in this round.
    let verdicts = bench.send(&segment, "bad\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "mapper_parsing_exception"), "{verdicts:?}");
    bench.end().await;
}

#[tokio::test]
async fn a_closed_index_is_deferred_at_once_and_others_go_on() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "closed" => error(index, 400, "index_closed_exception"),
            "read-only" => error(index, 403, "cluster_block_exception"),
            _ => created(index),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    for (index, why) in
        [("closed", "index_closed_exception"), ("read-only", "cluster_block_exception")]
    {
        let verdicts = bench.send(&lines(index), "1\n\n3\n").verdicts().await;
        assert!(is_deferred(&verdicts[0], why) && is_deferred(&verdicts[2], why), "{verdicts:?}");
        assert_eq!(refused_by(&verdicts[0]), Some(index));
        let before = server.bulks().len();
        let verdicts = bench.send(&lines(index), "4\n").verdicts().await;
        assert!(is_deferred(&verdicts[0], why), "{verdicts:?}");
        assert_eq!(refused_by(&verdicts[0]), Some(index));
        assert_eq!(server.bulks().len(), before, "known, so not asked again at once");
    }
    assert_eq!(bench.send(&lines("open"), "5\n").verdicts().await, [Verdict::Stored]);
    bench.end().await;
}

#[tokio::test]
async fn an_alias_or_data_stream_is_refused_before_anything_is_written() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false if request.line.starts_with("GET /alias/") => {
            Answer::Json(200, json!({ "real": { "settings": { "index": { "uuid": "u" } } } }))
        }
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("alias"), "1\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], "alias is an alias (of real)"), "{verdicts:?}");
    assert_eq!(refused_by(&verdicts[0]), Some("alias"));
    assert_eq!(bench.send(&lines("index"), "1\n").verdicts().await, [Verdict::Stored]);
    bench.end().await;
    assert_eq!(server.bulks().len(), 1);
}

#[tokio::test]
async fn a_document_that_landed_elsewhere_is_never_stored() {
    // The key may not ask what stands behind a name.
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, id| match index {
            "stream" => created(".ds-stream-000001"),
            "routed" if id == request.documents()[0].1 => created("other"),
            _ => created(index),
        }),
        false => Answer::Json(403, json!({ "error": { "type": "security_exception" } })),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("stream"), "1\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], ".ds-stream-000001"), "{verdicts:?}");
    // A name that other documents prove to be an index: a pipeline did it.
    let verdicts = bench.send(&lines("routed"), "1\n2\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "pipeline"), "{verdicts:?}");
    assert_eq!(verdicts[1], Verdict::Stored);
    bench.end().await;
}

#[tokio::test]
async fn a_line_that_a_pipeline_drops_is_parked() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "dead" => created(index),
            _ => item(index, 200, json!({ "result": "noop" })),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("a"), "1\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "pipeline"), "{verdicts:?}");
    bench.end().await;
}

#[tokio::test]
async fn a_dead_letter_that_cannot_be_written_defers_its_lines() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "dead" => error(index, 403, "security_exception"),
            _ => item(index, 200, json!({ "result": "noop" })),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("a"), "1\n").verdicts().await;
    assert!(is_deferred(&verdicts[0], "security_exception"), "{verdicts:?}");
    assert_eq!(refused_by(&verdicts[0]), Some("dead"));
    bench.end().await;
}

#[tokio::test]
async fn a_dead_letter_that_is_there_already_is_believed_at_its_second_conflict() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| match index {
            "dead" => error(index, 409, "version_conflict_engine_exception"),
            _ => item(index, 200, json!({ "result": "noop" })),
        }),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("a"), "1\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "pipeline"), "{verdicts:?}");
    bench.end().await;
    assert_eq!(server.bulks().len(), 3);
}

#[tokio::test]
async fn a_request_that_is_too_large_is_halved_and_a_single_document_parked() {
    let server = Server::start(|request| match request.is_bulk() {
        true if request.body.contains("\"dead\"") => items(request, |index, _| created(index)),
        true if request.documents().len() > 2 => Answer::Json(413, json!({})),
        true if request.documents()[0].1.ends_with('A') && request.documents().len() == 2 => {
            Answer::Json(400, json!({ "error": { "type": "illegal_argument_exception" } }))
        }
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let text: String = (0..16).map(|number| format!("{number}\n")).collect();
    assert_eq!(bench.send(&lines("a"), text).verdicts().await, vec![Verdict::Stored; 16]);
    bench.end().await;

    let server = Server::start(|request| match request.is_bulk() {
        true if request.body.contains("\"dead\"") => items(request, |index, _| created(index)),
        true if request.documents().len() > 1 => Answer::Json(413, json!({})),
        true if request.body.len() > 1 => match request.documents()[0].0.as_str() {
            "big" => Answer::Json(413, json!({})),
            index => Answer::Json(200, json!({ "errors": false, "items": [created(index)] })),
        },
        _ => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let verdicts = bench.send(&lines("big"), "1\n").verdicts().await;
    assert!(is_parked(&verdicts[0], "413"), "{verdicts:?}");
    assert_eq!(bench.send(&lines("small"), "1\n2\n").verdicts().await, vec![Verdict::Stored; 2]);
    bench.end().await;
}

#[tokio::test]
async fn a_proxy_that_refuses_every_request_parks_nothing() {
    let server = Server::start(|request| match request.is_bulk() {
        true => Answer::Raw(
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 12\r\n\r\nplain HTTP?\n".to_vec(),
        ),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let text: String = (0..100).map(|number| format!("{number}\n")).collect();
    let verdicts = bench.send(&lines("a"), text).verdicts().await;
    assert!(verdicts.iter().all(|verdict| is_deferred(verdict, "400")), "{verdicts:?}");
    assert!(server.bulks().len() < 50, "not one request per line: {}", server.bulks().len());
    bench.end().await;
}

#[tokio::test]
async fn a_revoked_secret_pauses_everything_until_a_new_one_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let key = folder.path().join("key");
    std::fs::write(&key, "old:key\n").expect("written");
    let server = Server::start(|request| {
        // base64 of new:key, in lower case as all headers here.
        if !request.headers.contains("authorization: apikey bmv3omtleq==") {
            return Answer::Json(401, json!({ "error": { "type": "security_exception" } }));
        }
        match request.is_bulk() {
            true => items(request, |index, _| created(index)),
            false => other(request),
        }
    })
    .await;
    let auth = ElasticsearchAuth::ApiKey(key.clone());
    let bench = Bench::start(&ElasticsearchConfig { auth, ..config(&[&server.url]) });
    let sent = bench.send(&lines("a"), "1\n");
    let mut health = bench.health.clone();
    let down =
        |health: &Health| matches!(health, Health::Down { reason } if reason.contains("401"));
    within(health.wait_for(down)).await.expect("the destination runs");
    assert!(sent.inbox.try_take().is_empty(), "nothing is receipted");
    std::fs::write(&key, "new:key\n").expect("written");
    assert_eq!(sent.verdicts().await, [Verdict::Stored]);
    assert_eq!(*health.borrow(), Health::Ready);
    bench.end().await;
}

#[tokio::test]
async fn half_an_answer_means_unknown_and_the_same_ids_are_sent_again() {
    let mut number = 0;
    let server = Server::start(move |request| match request.is_bulk() {
        true => {
            number += 1;
            match number {
                1 => Answer::Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{\"err".to_vec()),
                2 => Answer::Json(200, json!({ "errors": false, "items": [created("a")] })),
                3 => Answer::Json(502, json!({})),
                4 => Answer::Raw(Vec::new()),
                _ => items(request, |index, _| {
                    error(index, 409, "version_conflict_engine_exception")
                }),
            }
        }
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), "1\n2\n");
    assert_eq!(sent.verdicts().await, vec![Verdict::Already; 2]);
    bench.end().await;
    let ids: Vec<_> = server.bulks().iter().flat_map(Request::documents).collect();
    assert!(ids.iter().all(|document| ids[..2].contains(document)));
    let conflicts = server.bulks().split_off(4);
    let both = conflicts.iter().filter(|bulk| bulk.at >= conflicts[0].at + PAUSE).count();
    assert!(both >= 1, "a conflict with our own first try is not believed at once");
}

#[tokio::test]
async fn another_url_takes_over() {
    let dead = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let gone = format!("http://{}", dead.local_addr().expect("an address"));
    drop(dead);
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&gone, &server.url]));
    assert_eq!(bench.send(&lines("a"), "1\n").verdicts().await, [Verdict::Stored]);
    bench.end().await;
}

#[tokio::test]
async fn a_corrupt_spool_record_is_parked_as_it_is() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let mut records = Vec::new();
    encode_spool_record(&mut records, 1, b"", b"good");
    records.extend_from_slice(&[0xff; 20]);
    let verdicts = bench.send(&segment("a", Framing::SPOOL), records).verdicts().await;
    assert_eq!(verdicts[0], Verdict::Stored);
    assert!(is_parked(&verdicts[1], "corrupt"), "{verdicts:?}");
    bench.end().await;
    let letters = server.bulks();
    let letter = &letters.last().expect("a dead letter").sources()[0];
    assert_eq!(letter["line_base64"], "//////////////////////////8=");
    assert_eq!(letter["line"], Value::Null);
}

#[tokio::test]
async fn a_frame_larger_than_a_batch_goes_in_parts() {
    let server = Server::start(|request| match request.is_bulk() {
        true => items(request, |index, _| created(index)),
        false => other(request),
    })
    .await;
    let config = ElasticsearchConfig { batch_bytes_max: 4000, ..config(&[&server.url]) };
    let bench = Bench::start(&config);
    let text: String = (0..500).map(|number| format!("{number}\n\n")).collect();
    let verdicts = bench.send(&lines("a"), text).verdicts().await;
    let stored = verdicts.iter().filter(|verdict| **verdict == Verdict::Stored).count();
    assert_eq!((stored, verdicts.len()), (500, 1000));
    bench.end().await;
    assert!(server.bulks().len() > 5);
    assert!(server.bulks().iter().all(|bulk| bulk.body.len() < 8000));
}

#[tokio::test]
async fn a_stop_ends_the_retries_and_receipts_nothing() {
    let dead = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let gone = format!("http://{}", dead.local_addr().expect("an address"));
    drop(dead);
    let bench = Bench::start(&config(&[&gone]));
    let sent = bench.send(&lines("a"), "1\n");
    let mut health = bench.health.clone();
    let down = |health: &Health| matches!(health, Health::Down { .. });
    within(health.wait_for(down)).await.expect("the destination runs");
    bench.shutdown.cancel();
    within(bench.running).await.expect("no panic");
    assert!(sent.inbox.try_take().is_empty());
}

#[tokio::test]
async fn a_document_that_breaks_every_request_does_not_keep_the_slot() {
    let mut poison = String::new();
    let server = Server::start(move |request| {
        if !request.is_bulk() {
            return other(request);
        }
        let documents = request.documents();
        if poison.is_empty() {
            let mut its = documents.iter().filter(|(index, _)| index == "a");
            poison = its.nth(3).map(|(_, id)| id.clone()).unwrap_or_default();
        }
        match documents.iter().any(|(index, id)| index == "a" && *id == poison) {
            true => Answer::Json(500, json!({ "error": { "type": "bug" } })),
            false => items(request, |index, _| created(index)),
        }
    })
    .await;
    let bench = Bench::start(&config(&[&server.url]));
    let sent = bench.send(&lines("a"), "1\n2\n3\n4\n5\n6\n");
    assert_eq!(bench.send(&lines("b"), "1\n").verdicts().await, [Verdict::Stored]);
    let verdicts = sent.verdicts().await;
    assert!(is_parked(&verdicts[3], "bug"), "{verdicts:?}");
    assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Stored).count(), 5);
    bench.end().await;
}
