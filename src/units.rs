//! Sizes, rates and times as people read them. Pure.

use crate::limits::KIB;

/// A size: `512 B`, `1.5 KiB`, `118 MiB`. Rounded down, so that "0 B left" is never said too early.
#[must_use]
pub fn size(bytes: u64) -> String {
    const STEP: u64 = KIB as u64;
    if bytes < STEP {
        return format!("{bytes} B");
    }
    let mut unit = STEP;
    let mut names = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
    let mut name = names.next().unwrap_or_default();
    while bytes / unit >= STEP
        && let Some(next) = names.next()
    {
        unit *= STEP;
        name = next;
    }
    let whole = bytes / unit;
    if whole >= 100 {
        return format!("{whole} {name}");
    }
    // The remainder is below an exbibyte, so ten times it fits.
    format!("{whole}.{} {name}", bytes % unit * 10 / unit)
}

/// Bytes a second.
#[must_use]
pub fn rate(bytes: u64) -> String {
    format!("{}/s", size(bytes))
}

/// A time: `12 ms`, `3.4 s`, `2m 05s`, `3h 07m`.
#[must_use]
pub fn time_ms(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms} ms"),
        1..60 => format!("{seconds}.{} s", ms % 1000 / 100),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A short time: `850 us`, `8.3 ms`, then as [`time_ms`].
#[must_use]
pub fn time_us(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..100_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        _ => time_ms(us / 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_unit_and_are_rounded_down() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1535, "1.4 KiB"),
            ((100 << 20) - 1, "99.9 MiB"),
            (118 << 20, "118 MiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (20 << 30, "20.0 GiB"),
            (3 << 40, "3.0 TiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(rate(2048), "2.0 KiB/s");
    }

    #[test]
    fn times_have_the_unit_that_matters() {
        for (ms, text) in [(0, "0 ms"), (999, "999 ms"), (3_450, "3.4 s"), (125_000, "2m 05s"), (11_220_000, "3h 07m")]
        {
            assert_eq!(time_ms(ms), text);
        }
        for (us, text) in [(850, "850 us"), (8_350, "8.3 ms"), (99_999, "99.9 ms"), (150_000, "150 ms")] {
            assert_eq!(time_us(us), text);
        }
    }
}
