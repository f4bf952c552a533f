//! Page tables that map the first 16 GiB to themselves (Intel SDM volume 3, 5.5 "4-Level Paging"): the monitor maps one GiB
//! only, and the registers of devices are above it.

use crate::cpu;
use crate::memory::{self, MAPPED, PAGE_TABLES};

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
const TABLE: u64 = 4096;
/// What one table of the second level maps.
const PER_TABLE: u64 = 1 << 30;

/// Builds the tables and uses them from now on.
pub fn enable() {
    let (level4, level3, level2) = (PAGE_TABLES, PAGE_TABLES + TABLE, PAGE_TABLES + 2 * TABLE);
    memory::write(level4, level3 | PRESENT_WRITABLE);
    for table in 0..MAPPED / PER_TABLE {
        memory::write(level3 + 8 * table, (level2 + TABLE * table) | PRESENT_WRITABLE);
    }
    for page in 0..MAPPED / LARGE_PAGE {
        memory::write(level2 + 8 * page, (page * LARGE_PAGE) | PRESENT_WRITABLE | LARGE);
    }
    cpu::set_page_tables(level4);
}
