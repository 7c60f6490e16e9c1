//! As much JSON as QEMU's monitor speaks: finds a value in one line, and writes a string into another.
//!
//! A line is a peer's bytes. It is walked, never built into anything: [`find`] returns a slice of it, so nothing is
//! allocated, and a line that is no JSON has no values. It is not a validator: what is beside the path that is asked
//! for is only skipped.

/// The raw text of the value at `path`, a list of names of objects within objects. `None`: there is none.
#[must_use]
pub fn find<'a>(line: &'a str, path: &[&str]) -> Option<&'a str> {
    let mut value = line.trim();
    for name in path {
        value = field(value, name)?;
    }
    Some(value)
}

/// The string at `path`, without its quotes, escapes left as they are.
#[must_use]
pub fn string<'a>(line: &'a str, path: &[&str]) -> Option<&'a str> {
    find(line, path)?.strip_prefix('"')?.strip_suffix('"')
}

/// The whole number at `path`.
#[must_use]
pub fn number(line: &str, path: &[&str]) -> Option<u64> {
    find(line, path)?.parse().ok()
}

/// The truth at `path`.
#[must_use]
pub fn truth(line: &str, path: &[&str]) -> Option<bool> {
    find(line, path)?.parse().ok()
}

/// Appends `text` as a JSON string.
pub fn quote(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// The value of the field `name` of an object.
fn field<'a>(object: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = object.strip_prefix('{')?.trim_start();
    loop {
        let (key, after) = value(rest)?;
        rest = after.trim_start().strip_prefix(':')?.trim_start();
        let (found, after) = value(rest)?;
        if key.strip_prefix('"').and_then(|key| key.strip_suffix('"')) == Some(name) {
            return Some(found);
        }
        rest = after.trim_start().strip_prefix(',')?.trim_start();
    }
}

/// The first value of `text` and what follows it.
fn value(text: &str) -> Option<(&str, &str)> {
    let end = match text.bytes().next()? {
        b'"' => string_end(text)?,
        b'{' | b'[' => nested_end(text)?,
        _ => text.find([',', '}', ']', ':', ' ', '\r', '\n', '\t']).unwrap_or(text.len()),
    };
    (end > 0).then(|| text.split_at(end))
}

/// The end of the string that `text` begins with.
fn string_end(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// The end of the object or list that `text` begins with.
fn nested_end(text: &str) -> Option<usize> {
    let (mut depth, mut at) = (0_usize, 0);
    while let Some(byte) = text.as_bytes().get(at) {
        match byte {
            b'"' => {
                at += string_end(&text[at..])?;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        at += 1;
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENT: &str = "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"MIGRATION\", \
                         \"data\": {\"x\": [\"}\", {\"status\": 1}], \"status\": \"pre-switchover\"}}";

    #[test]
    fn values_are_found_by_their_path() {
        assert_eq!(string(EVENT, &["event"]), Some("MIGRATION"));
        assert_eq!(string(EVENT, &["data", "status"]), Some("pre-switchover"));
        assert_eq!(number(EVENT, &["timestamp", "microseconds"]), Some(2));
        assert_eq!(find(EVENT, &["data", "x"]), Some(r#"["}", {"status": 1}]"#));
        assert_eq!(find(EVENT, &["data", "nothing"]), None);
        assert_eq!(find(EVENT, &["event", "status"]), None, "a string has no fields");
        assert_eq!(truth(r#"{"return":{"running":true,"status":"running"}}"#, &["return", "running"]), Some(true));
        assert_eq!(find(r#"{"return": {}}"#, &["return"]), Some("{}"));
        assert_eq!(
            string(r#"{"a\"b": 1, "desc": "say \"no\", then } go"}"#, &["desc"]),
            Some(r#"say \"no\", then } go"#)
        );
    }

    #[test]
    fn what_is_no_object_has_no_values() {
        for line in
            ["", "{", "}", "[]", "{}", "nil", "{\"a\"", "{\"a\":", "{\"a\":}", "{\"a\" 1}", "{\"a\":\"b}", "{,}", "{:}"]
        {
            assert_eq!(find(line, &["b"]), None, "{line}");
        }
    }

    #[test]
    fn strings_are_quoted() {
        let mut out = String::new();
        quote("unix:/a\"b\\c\n", &mut out);
        assert_eq!(out, r#""unix:/a\"b\\c\u000a""#);
        assert_eq!(string(&format!("{{\"a\":{out}}}"), &["a"]), Some(r#"unix:/a\"b\\c\u000a"#));
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in "[\\[\\]{}:,\"\\\\a1 é]{0,40}", name in "[a1]{0,2}") {
            let _ = (find(&line, &[&name]), find(&line, &["a", &name]), string(&line, &[&name]));
        }
    }
}
