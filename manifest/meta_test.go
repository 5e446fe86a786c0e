package manifest_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
)

// testKept is a meta of a snapshot that was locked, shared, and deleted when the
// lock had expired.
func testKept() manifest.Meta {
	m := testMeta()
	m.Lock = &manifest.Lock{Mode: manifest.LockCompliance, Created: testTime, Until: testTime.AddDate(0, 0, 7), CoolOff: testTime.Add(24 * time.Hour)}
	m.Bin = &manifest.Bin{Entered: testTime.AddDate(0, 0, 8), Until: testTime.AddDate(0, 0, 15)}
	m.Shares = []string{"123456789012", "all", "backup.reader"}
	return m
}

func testPolicy() manifest.Policy {
	return manifest.Policy{
		Version: 1, PublicAccess: manifest.PublicBlockNew,
		Retain: []manifest.RetainRule{{Seconds: 604800}, {Tag: "env", Value: "prod", Seconds: 2592000}},
	}
}

func TestMetaAndPolicyDecodeToWhatWasEncoded(t *testing.T) {
	checkRoundTrip(t, testKept())
	checkRoundTrip(t, testPolicy())
	checkRoundTrip(t, manifest.Policy{Version: 1})
	pending := testMeta()
	pending.Lock = &manifest.Lock{Mode: manifest.LockGovernance, Created: testTime, Days: 36500}
	checkRoundTrip(t, pending)
}

func TestInvalidMetaAndPolicyAreNeitherWrittenNorRead(t *testing.T) {
	for name, damage := range map[string]func(*manifest.Meta){
		"mode":                 func(m *manifest.Meta) { m.Lock.Mode = "" },
		"created":              func(m *manifest.Meta) { m.Lock.Created = time.Time{} },
		"no end":               func(m *manifest.Meta) { m.Lock.Until = time.Time{} },
		"two ends":             func(m *manifest.Meta) { m.Lock.Days = 1 },
		"days":                 func(m *manifest.Meta) { m.Lock.Until, m.Lock.Days = time.Time{}, 36501 },
		"cool-off of the weak": func(m *manifest.Meta) { m.Lock.Mode = manifest.LockGovernance },
		"entered":              func(m *manifest.Meta) { m.Bin.Entered = time.Time{} },
		"left before":          func(m *manifest.Meta) { m.Bin.Until = m.Bin.Entered.Add(-1) },
		"account":              func(m *manifest.Meta) { m.Shares[0] = "" },
		"order":                func(m *manifest.Meta) { m.Shares[0] = "z" },
		"twice":                func(m *manifest.Meta) { m.Shares[1] = m.Shares[0] },
		"too many":             func(m *manifest.Meta) { m.Shares = make([]string, manifest.MaxShares+1) },
	} {
		m := testKept()
		damage(&m)
		if data, err := manifest.EncodeRecord(m); err == nil {
			t.Errorf("%s: encoded as %s", name, data)
		}
	}
	for name, p := range map[string]manifest.Policy{
		"public access": {Version: 1, PublicAccess: "none"},
		"no time":       {Version: 1, Retain: []manifest.RetainRule{{}}},
		"too long":      {Version: 1, Retain: []manifest.RetainRule{{Seconds: 366 * 86400}}},
		"value alone":   {Version: 1, Retain: []manifest.RetainRule{{Value: "x", Seconds: 1}}},
		"tag":           {Version: 1, Retain: []manifest.RetainRule{{Tag: strings.Repeat("x", 129), Seconds: 1}}},
		"many rules":    {Version: 1, Retain: make([]manifest.RetainRule, 1001)},
		"version":       {Version: 2},
	} {
		if data, err := manifest.EncodeRecord(p); err == nil {
			t.Errorf("%s: encoded as %s", name, data)
		}
	}
}

// The largest meta and policy fit into a record.
func TestTheLargestMetaFits(t *testing.T) {
	m := testKept()
	m.Shares, m.Tags = nil, make(map[string]string)
	for i := range manifest.MaxShares {
		m.Shares = append(m.Shares, time.Unix(int64(i), 0).UTC().Format("20060102150405")+strings.Repeat("x", 114))
	}
	for i := range manifest.MaxTags {
		m.Tags[strings.Repeat("\x01", 127)+string(rune('a'+i))] = strings.Repeat("\x01", 256)
	}
	checkRoundTrip(t, m)
}

func TestLockStates(t *testing.T) {
	day := 24 * time.Hour
	compliance := manifest.Lock{Mode: manifest.LockCompliance, Until: testTime.Add(7 * day), CoolOff: testTime.Add(day)}
	weak := manifest.Lock{Mode: manifest.LockGovernance, Days: 2}
	for _, c := range []struct {
		lock  manifest.Lock
		ended time.Time
		now   time.Duration
		want  string
	}{
		{compliance, testTime, 0, manifest.LockStateCoolOff},
		{compliance, testTime, day - 1, manifest.LockStateCoolOff},
		{compliance, testTime, day, manifest.LockStateCompliance},
		{compliance, testTime, 7*day - 1, manifest.LockStateCompliance},
		{compliance, testTime, 7 * day, manifest.LockStateExpired},
		{compliance, time.Time{}, 7 * day, manifest.LockStateExpired},
		{weak, time.Time{}, 1000 * day, manifest.LockStateGovernance},
		{weak, testTime, 2*day - 1, manifest.LockStateGovernance},
		{weak, testTime, 2 * day, manifest.LockStateExpired},
	} {
		if got := c.lock.State(c.ended, testTime.Add(c.now)); got != c.want {
			t.Errorf("%+v of what ended %v is %s after %v, want %s", c.lock, c.ended, got, c.now, c.want)
		}
	}
}

func TestAccounts(t *testing.T) {
	for _, s := range []string{"123456789012", "all", "a", "Backup.Reader@x_1+=,-", strings.Repeat("a", 128)} {
		if err := manifest.CheckAccount(s); err != nil {
			t.Error(err)
		}
	}
	for _, s := range []string{"", "-a", "a b", "a/b", "ä", "*", "a\"", strings.Repeat("a", 129)} {
		if err := manifest.CheckAccount(s); !errors.Is(err, manifest.ErrAccount) {
			t.Errorf("%q: %v", s, err)
		}
	}
}
