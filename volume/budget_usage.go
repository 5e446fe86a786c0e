package volume

// BudgetUsage is how much of a Budget is used. Sizes are in bytes.
type BudgetUsage struct {
	Limit int64 // 0: all but a tenth of the filesystem
	Used  int64 // by the clean bytes of all processes of the host

	// What this process evicted, whosever it was.
	Evictions int64
	Evicted   int64
}

// Usage measures what is used, which takes a few system calls for each base and
// volume of the host.
func (b *Budget) Usage() (BudgetUsage, error) {
	used, err := b.cleanBytes()
	return BudgetUsage{Limit: b.limit, Used: used, Evictions: b.rounds.Load(), Evicted: b.evicted.Load()}, err
}

// CacheUsage is that of the budget of the device's host, zero if it has none.
func (d *Device) CacheUsage() (BudgetUsage, error) {
	if d.host.Budget == nil {
		return BudgetUsage{}, nil
	}
	return d.host.Budget.Usage()
}
