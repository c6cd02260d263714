//! Index names: a pure function of a row, so that a line sent again lands in the same index.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Day;

/// The rule when none is configured. It lies outside `logs-*-*`, whose built-in template in
/// Elasticsearch would make a data stream of it.
pub const DEFAULT_RULE: &str = "waybill-{type}-{yyyy.MM.dd}";

/// The types a token may use when its entry lists none.
pub const DEFAULT_TYPES: [&str; 5] = ["default", "nginx", "syslog", "supervisor", "app"];

/// The longest index name that Elasticsearch takes, in bytes.
const NAME_BYTES_MAX: usize = 255;

/// A line's type: `[a-z0-9_-]{1,64}`, part of its index name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TypeName(String);

/// What is wrong with a type name.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("type {0:?} must be 1 to 64 characters of a-z, 0-9, '_' and '-'")]
pub struct TypeNameError(String);

impl TypeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TypeName {
    fn default() -> TypeName {
        TypeName("default".to_owned())
    }
}

impl TryFrom<String> for TypeName {
    type Error = TypeNameError;

    fn try_from(text: String) -> Result<TypeName, TypeNameError> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
        if (1..=64).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(TypeName(text))
        } else {
            Err(TypeNameError(text))
        }
    }
}

impl std::str::FromStr for TypeName {
    type Err = TypeNameError;

    fn from_str(text: &str) -> Result<TypeName, TypeNameError> {
        TypeName::try_from(text.to_owned())
    }
}

impl From<TypeName> for String {
    fn from(name: TypeName) -> String {
        name.0
    }
}

impl fmt::Display for TypeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How an index name is made: literal text, `{type}`, and a date as `{yyyy.MM.dd}` or Logstash's
/// `%{+YYYY.MM.dd}`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IndexRule {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Part {
    Literal(String),
    Type,
    Year,
    Month,
    DayOfMonth,
}

/// What is wrong with an index rule.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum IndexRuleError {
    /// A brace without its partner.
    #[error("index rule {0:?} has a '{{' without its '}}'")]
    Unclosed(String),
    /// Something in braces that is neither the type nor a date.
    #[error(
        "index rule has '{0}', which is not known: use {{type}}, {{yyyy.MM.dd}} or %{{+YYYY.MM.dd}}"
    )]
    UnknownField(String),
    /// Elasticsearch would refuse the name.
    #[error("index rule {rule:?} makes a name that Elasticsearch refuses: {reason}")]
    BadName {
        /// The rule as typed.
        rule: String,
        /// Which of Elasticsearch's rules the name breaks.
        reason: &'static str,
    },
}

impl IndexRule {
    /// Parses a rule and checks that what it makes is an index name.
    pub fn parse(text: &str) -> Result<IndexRule, IndexRuleError> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(open) = rest.find('{') {
            let close =
                rest[open..].find('}').ok_or_else(|| IndexRuleError::Unclosed(text.to_owned()))?
                    + open;
            let literal = rest[..open].strip_suffix('%').unwrap_or(&rest[..open]);
            if !literal.is_empty() {
                parts.push(Part::Literal(literal.to_owned()));
            }
            let field = &rest[open + 1..close];
            match field {
                "type" => parts.push(Part::Type),
                _ => date_parts(field.strip_prefix('+').unwrap_or(field), &mut parts)
                    .ok_or_else(|| IndexRuleError::UnknownField(field.to_owned()))?,
            }
            rest = &rest[close + 1..];
        }
        if !rest.is_empty() {
            parts.push(Part::Literal(rest.to_owned()));
        }
        let rule = IndexRule { text: text.to_owned(), parts };
        let longest = TypeName("x".repeat(64));
        match name_fault(&rule.name(&longest, Day::today())) {
            Some(reason) => Err(IndexRuleError::BadName { rule: rule.text, reason }),
            None => Ok(rule),
        }
    }

    /// The index of a row.
    pub fn name(&self, type_name: &TypeName, day: Day) -> String {
        let mut name = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(text) => name.push_str(text),
                Part::Type => name.push_str(type_name.as_str()),
                Part::Year => name.push_str(&format!("{:04}", day.0.year())),
                Part::Month => name.push_str(&format!("{:02}", day.0.month())),
                Part::DayOfMonth => name.push_str(&format!("{:02}", day.0.day())),
            }
        }
        name
    }

    /// A wildcard that covers every index this rule can make, for searches and templates.
    pub fn wildcard(&self) -> String {
        let mut name = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(text) => name.push_str(text),
                _ if name.ends_with('*') => {}
                _ => name.push('*'),
            }
        }
        // Dots between the parts of a date are literals: `a-*.*.*` says no more than `a-*`.
        while let Some(shorter) = name.strip_suffix(".*").filter(|rest| rest.ends_with('*')) {
            name = shorter.to_owned();
        }
        name
    }

    /// The rule as it was typed.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl Default for IndexRule {
    fn default() -> IndexRule {
        IndexRule::parse(DEFAULT_RULE).expect("the default rule is a rule")
    }
}

impl TryFrom<String> for IndexRule {
    type Error = IndexRuleError;

    fn try_from(text: String) -> Result<IndexRule, IndexRuleError> {
        IndexRule::parse(&text)
    }
}

impl From<IndexRule> for String {
    fn from(rule: IndexRule) -> String {
        rule.text
    }
}

impl fmt::Display for IndexRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn date_parts(format: &str, parts: &mut Vec<Part>) -> Option<()> {
    let mut rest = format;
    let mut fields = 0;
    while !rest.is_empty() {
        let (part, length) = match rest {
            _ if rest.starts_with("yyyy") || rest.starts_with("YYYY") => (Part::Year, 4),
            _ if rest.starts_with("MM") => (Part::Month, 2),
            _ if rest.starts_with("dd") => (Part::DayOfMonth, 2),
            _ if rest.starts_with(['.', '-', '_']) => (Part::Literal(rest[..1].to_owned()), 1),
            _ => return None,
        };
        fields += usize::from(!matches!(part, Part::Literal(_)));
        parts.push(part);
        rest = &rest[length..];
    }
    (fields > 0).then_some(())
}

/// Elasticsearch's rules for index names (its create-index API, "Path parameters").
fn name_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() > NAME_BYTES_MAX {
        Some("it is longer than 255 bytes")
    } else if name.starts_with(['-', '_', '+', '.']) {
        Some("it starts with '-', '_', '+' or '.'")
    } else if name.chars().any(|c| c.is_uppercase()) {
        Some("it has an upper-case letter")
    } else if name.chars().any(|c| r#"\/*?"<>| ,#:%{}"#.contains(c) || c.is_control()) {
        Some(r#"it has one of \ / * ? " < > | , # : % or a space"#)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(rule: &str) -> String {
        let rule = IndexRule::parse(rule).expect("a good rule");
        let type_name = "nginx".parse().expect("a good type");
        rule.name(&type_name, "2026-11-05".parse().expect("a day"))
    }

    #[test]
    fn rules_make_names() {
        assert_eq!(name(DEFAULT_RULE), "waybill-nginx-2026.11.05");
        assert_eq!(name("web-%{+YYYY.MM.dd}"), "web-2026.11.05");
        assert_eq!(name("{type}_{yyyy-MM}"), "nginx_2026-11");
        assert_eq!(name("fixed"), "fixed");
    }

    #[test]
    fn wildcards_cover_the_names() {
        assert_eq!(IndexRule::default().wildcard(), "waybill-*-*");
        assert_eq!(IndexRule::parse("web-{yyyy.MM.dd}").expect("rule").wildcard(), "web-*");
        assert_eq!(IndexRule::parse("fixed").expect("rule").wildcard(), "fixed");
    }

    #[test]
    fn bad_rules_say_why() {
        for (rule, says) in [
            ("Logs-{type}", "upper-case"),
            ("a{host}", "{type}, {yyyy.MM.dd}"),
            ("a{type", "without its"),
            ("-x", "starts with"),
            ("a b", "space"),
            ("", "empty"),
            ("x{.}", "not known"),
        ] {
            let error = IndexRule::parse(rule).expect_err(rule).to_string();
            assert!(error.contains(says), "{rule}: {error}");
        }
        assert!("Upper".parse::<TypeName>().is_err());
        assert!("a/b".parse::<TypeName>().is_err());
        assert!("".parse::<TypeName>().is_err());
    }
}
