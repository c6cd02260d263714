//! The names that rotation gives to a file: `NAME.N`, `NAME-DATE`, also compressed.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tracing::debug;

/// Rotated siblings of `path` that exist, in order of name. Nothing is said of their content.
pub fn siblings(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(Vec::new());
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        // A folder that may be entered and not listed: its files are followed by their names, and
        // those of others must not wait for it.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            debug!(folder = %folder.display(), %error, "rotated generations cannot be listed");
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if is_sibling(name.as_bytes(), entry.file_name().as_bytes()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Whether rotation makes `candidate` from `name`, or both from one name (`a.log.1` from `a.log`
/// becomes `a.log.2.gz`; `a.log` becomes `a-20261121.log` with logrotate's `extension`).
pub fn is_sibling(name: &[u8], candidate: &[u8]) -> bool {
    if name == candidate {
        return false;
    }
    let base = base(name);
    is_rotated(base, candidate) || (candidate == base && name != base)
}

/// The path before any rotation of it, where this one has a rotated name.
pub fn is_rotated_name(path: &[u8]) -> Option<&[u8]> {
    let base = base(path);
    (base != path && !base.ends_with(b"/")).then_some(base)
}

/// The name before any rotation of it.
fn base(name: &[u8]) -> &[u8] {
    let plain = strip_compression(name);
    for at in (1..plain.len()).rev() {
        if matches!(plain[at], b'.' | b'-') && is_suffix(&plain[at..]) {
            return &plain[..at];
        }
    }
    plain
}

fn is_rotated(base: &[u8], candidate: &[u8]) -> bool {
    let plain = strip_compression(candidate);
    if let Some(rest) = plain.strip_prefix(base) {
        return is_suffix(rest) || (rest.is_empty() && plain != candidate);
    }
    // logrotate's `extension .log`: NAME-DATE.log.
    let Some(dot) = base.iter().rposition(|&byte| byte == b'.').filter(|&dot| dot > 0) else {
        return false;
    };
    let (stem, extension) = base.split_at(dot);
    plain.strip_prefix(stem).and_then(|rest| rest.strip_suffix(extension)).is_some_and(is_suffix)
}

fn strip_compression(name: &[u8]) -> &[u8] {
    [&b".gz"[..], b".zst", b".xz"]
        .iter()
        .find_map(|ending| name.strip_suffix(*ending))
        .unwrap_or(name)
}

/// `.N` with up to four digits; `-DATE` or `.DATE` with digits, dashes, `T` and underscores.
fn is_suffix(suffix: &[u8]) -> bool {
    let Some((first, rest)) = suffix.split_first() else { return false };
    let digits = rest.iter().filter(|byte| byte.is_ascii_digit()).count();
    match first {
        b'.' if digits == rest.len() && (1..=4).contains(&digits) => true,
        b'.' | b'-' => {
            digits >= 6
                && rest[0].is_ascii_digit()
                && rest.iter().all(|byte| byte.is_ascii_digit() || b"-_T.".contains(byte))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_names_are_known() {
        for candidate in [
            "app.log.1",
            "app.log.12.gz",
            "app.log-20261121",
            "app.log-20261121.gz",
            "app.log-2026-11-21",
            "app.log.20261121-1700.zst",
            "app.log.gz",
            "app-20261121.log",
            "app-20261121.log.xz",
            "app.log-1763712000",
        ] {
            assert!(is_sibling(b"app.log", candidate.as_bytes()), "{candidate}");
        }
        for candidate in [
            "app.log",
            "app.log.bak",
            "app.log.1.tmp",
            "other.log.1",
            "app.logger",
            "app.log.",
            "app.log-x",
        ] {
            assert!(!is_sibling(b"app.log", candidate.as_bytes()), "{candidate}");
        }
        assert!(is_sibling(b"app.log.1", b"app.log.2.gz"));
        assert!(is_sibling(b"app.log.1", b"app.log"));
        assert!(!is_sibling(b"app.log.1", b"app.log.1"));
    }
}
