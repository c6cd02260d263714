//! What the query of the opening handshake says of all lines of a connection: where a sender has a
//! configuration, a text client has its URL.

use crate::receiver::session::Sender;
use crate::record::TypeName;
use crate::transport::Refuse;

/// The longest host name, in bytes.
const HOST_BYTES_MAX: usize = 255;

/// The longest tag, in bytes.
const TAG_BYTES_MAX: usize = 64;

/// How many tags there may be: each is copied into every document (I7).
const TAGS_MAX: usize = 16;

/// From the query, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::receiver) struct Origin {
    /// One that the sender may use.
    pub type_name: TypeName,
    /// `host.name` of lines that name none.
    pub host: String,
    /// Copied into each document.
    pub tags: Vec<String>,
}

impl Origin {
    /// Reads a query such as `type=nginx&host=web1&tag=edge`.
    ///
    /// # Errors
    ///
    /// 403 for a type that the sender may not use, 400 for what is not understood: a parameter
    /// with a typing error would otherwise put every line into the wrong index, unnoticed.
    pub fn read(query: Option<&str>, sender: &Sender) -> Result<Origin, Refuse> {
        let (mut type_name, mut host, mut tags) = (None, None, Vec::new());
        for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            let slot = match &*name {
                "type" => &mut type_name,
                "host" => &mut host,
                "tag" => {
                    tags.push(text("tag", &value, TAG_BYTES_MAX)?);
                    continue;
                }
                _ => {
                    let reason = format!("{name:?} is not known here: use type, host and tag\n");
                    return Err(Refuse::new(400, reason));
                }
            };
            if slot.replace(value).is_some() {
                return Err(Refuse::new(400, format!("{name} stands in the query twice\n")));
            }
        }
        if tags.len() > TAGS_MAX {
            return Err(Refuse::new(400, format!("{} tags, allowed are {TAGS_MAX}\n", tags.len())));
        }
        Ok(Origin {
            type_name: allowed(type_name.as_deref(), sender)?,
            host: host
                .map_or(Ok(sender.name.clone()), |host| text("host", &host, HOST_BYTES_MAX))?,
            tags,
        })
    }
}

/// The type asked for; without one `default`, or the only one that the sender may use.
fn allowed(asked: Option<&str>, sender: &Sender) -> Result<TypeName, Refuse> {
    let default = TypeName::default();
    let name = match (asked, &sender.types[..]) {
        (None, [only]) => only.as_str(),
        (asked, _) => asked.unwrap_or(default.as_str()),
    };
    sender.types.iter().find(|known| known.as_str() == name).cloned().ok_or_else(|| {
        let types: Vec<&str> = sender.types.iter().map(TypeName::as_str).collect();
        let reason = format!(
            "type {name:?} is not listed with this token: ask for one of {types:?} (?type=NAME), \
             or add it in the receiver's tokens file\n"
        );
        Refuse::new(403, reason)
    })
}

fn text(what: &str, value: &str, bytes_max: usize) -> Result<String, Refuse> {
    if (1..=bytes_max).contains(&value.len()) && !value.chars().any(char::is_control) {
        return Ok(value.to_owned());
    }
    let reason = format!("{what} must be 1 to {bytes_max} bytes without control characters\n");
    Err(Refuse::new(400, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::SenderId;

    fn read(query: &str, types: &[&str]) -> Result<Origin, Refuse> {
        let types = types.iter().map(|name| name.parse().expect("type")).collect();
        let sender =
            Sender { id: SenderId::mint(), name: "web-1".to_owned(), types, chain_key: None };
        Origin::read(Some(query).filter(|query| !query.is_empty()), &sender)
    }

    #[test]
    fn a_query_names_type_host_and_tags() {
        let origin = read("tag=a&type=nginx&tag=b+c&host=web%2D1.de", &["default", "nginx"]);
        let expected = Origin {
            type_name: "nginx".parse().expect("type"),
            host: "web-1.de".to_owned(),
            tags: vec!["a".to_owned(), "b c".to_owned()],
        };
        assert_eq!(origin, Ok(expected));
    }

    #[test]
    fn without_a_query_the_token_says_what_it_can() {
        let origin = read("", &["nginx", "default"]).expect("default");
        assert_eq!((origin.type_name.as_str(), &*origin.host), ("default", "web-1"));
        assert_eq!(read("", &["nginx"]).expect("the only one").type_name.as_str(), "nginx");
        let refuse = read("", &["nginx", "app"]).expect_err("which?");
        assert!(refuse.status == 403 && refuse.body.contains(r#"["nginx", "app"]"#), "{refuse:?}");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let types = ["default", "nginx"];
        for (query, status) in [
            ("type=billing", 403),
            ("type=", 403),
            ("type=..%2Fx", 403),
            ("type=nginx&type=nginx", 400),
            ("tpye=nginx", 400),
            ("host=", 400),
            ("host=a%00b", 400),
            ("tag=%0A", 400),
            (&"tag=a&".repeat(TAGS_MAX + 1), 400),
            (&format!("host={}", "h".repeat(HOST_BYTES_MAX + 1)), 400),
        ] {
            assert_eq!(read(query, &types).expect_err(query).status, status, "{query}");
        }
    }
}
