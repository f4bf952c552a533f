//! Runs one input of a target, without a fuzzer: `cargo xtask fuzz --reproduce TARGET FILE`.

#![forbid(unsafe_code)]

use anyhow::{Context as _, Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, file] = &arguments[..] else { bail!("TARGET FILE") };
    let target = fuzz::target(name).with_context(|| format!("there is no target {name}"))?;
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {file}"))?;
    // A task or a thread that panics is not always heard by those who wait for it.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
    let begun = std::time::Instant::now();
    (target.run)(&bytes);
    println!("{name}: {} bytes, nothing wrong, {} ms", bytes.len(), begun.elapsed().as_millis());
    Ok(())
}
