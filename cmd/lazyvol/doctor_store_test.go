package main

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/snapshot"
)

func TestDoctorJudgesAStore(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	wrap := func(err error) error { return fmt.Errorf("reach: %w", err) }
	base := storeFacts{
		url: "s3://b/p", id: "0001", objects: blockstore.NewDir("/none"),
		contact: blockstore.Contact{Asked: now, Took: 20 * time.Millisecond, Date: now, Region: "eu-west-1", Signed: "eu-west-1", AccessKey: "AKIA", Source: "env"},
	}
	with := func(judge func(storeFacts) finding, change func(*storeFacts)) finding {
		f := base
		change(&f)
		return judge(f)
	}
	same := func(*storeFacts) {}
	unmade := func(f *storeFacts) { *f = storeFacts{url: "file:///s", unmade: true} }
	keyless := func(f *storeFacts) { *f = storeFacts{url: "s3://b", opened: wrap(blockstore.ErrDenied)} }
	badURL := func(f *storeFacts) { *f = storeFacts{url: "b", opened: errors.New("no scheme")} }
	down := func(f *storeFacts) {
		f.reached, f.contact.Date, f.contact.Region, f.id = wrap(blockstore.ErrUnavailable), time.Time{}, "", ""
	}
	refused := func(f *storeFacts) {
		f.reached, f.format, f.id = wrap(blockstore.ErrDenied), wrap(blockstore.ErrDenied), ""
	}
	unlisted := func(f *storeFacts) { f.reached = wrap(blockstore.ErrDenied) }
	elsewhere := func(f *storeFacts) { f.reached, f.id = errors.New("expecting us-east-1"), "" }
	absent := func(f *storeFacts) { f.reached, f.id = wrap(blockstore.ErrNoStore), "" }
	folder := func(f *storeFacts) { f.contact = blockstore.Contact{Asked: now, Took: 1} }
	clock := func(off time.Duration) finding {
		return with(judgeClock, func(f *storeFacts) { f.contact.Asked = now.Add(off) })
	}
	checkJudged(t, map[string]judged{
		"store":            {with(judgeStore, same), levelOK, "answers in 20 ms"},
		"store, unmade":    {with(judgeStore, unmade), levelOK, "not there yet"},
		"store, keyless":   {with(judgeStore, keyless), levelSkipped, "credentials"},
		"store, bad URL":   {with(judgeStore, badURL), levelFailed, "no scheme"},
		"store, down":      {with(judgeStore, down), levelFailed, "AWS_ENDPOINT_URL"},
		"store, refused":   {with(judgeStore, refused), levelOK, "refuses"},
		"store, none":      {with(judgeStore, func(f *storeFacts) { f.reached = wrap(blockstore.ErrNoStore) }), levelFailed, "bucket"},
		"store, strange":   {with(judgeStore, func(f *storeFacts) { down(f); f.reached = errors.New("what") }), levelFailed, "what"},
		"store, elsewhere": {with(judgeStore, func(f *storeFacts) { f.reached, f.contact.Signed = errors.New("301"), "us-east-1" }), levelOK, "refuses"},
		"store, unlike S3": {with(judgeStore, func(f *storeFacts) { f.reached = errors.New("501") }), levelFailed, "501"},
		"store, far away":  {with(judgeStore, func(f *storeFacts) { f.contact.Took = time.Second }), levelWarning, "1000 ms"},

		"credentials":           {with(judgeCredentials, same), levelOK, "AKIA"},
		"credentials, folder":   {with(judgeCredentials, folder), levelSkipped, "folder"},
		"credentials, closed":   {with(judgeCredentials, func(f *storeFacts) { folder(f); refused(f) }), levelFailed, "rights"},
		"credentials, keyless":  {with(judgeCredentials, keyless), levelFailed, "AWS_PROFILE"},
		"credentials, down":     {with(judgeCredentials, down), levelSkipped, "does not answer"},
		"credentials, unmade":   {with(judgeCredentials, unmade), levelSkipped, "no store yet"},
		"credentials, refused":  {with(judgeCredentials, refused), levelFailed, "AKIA"},
		"credentials, unlisted": {with(judgeCredentials, unlisted), levelWarning, "mounted by their ids"},
		"credentials, absent":   {with(judgeCredentials, absent), levelSkipped, "not tried"},
		"credentials, unasked":  {with(judgeCredentials, elsewhere), levelSkipped, "not tried"},

		"credentials, late": {with(judgeCredentials, func(f *storeFacts) { refused(f); f.contact.Asked = now.Add(time.Hour) }), levelSkipped, "clock"},

		"clock":                {clock(0), levelOK, ""},
		"clock, by a second":   {clock(time.Second), levelOK, ""},
		"clock, ahead":         {clock(2 * time.Minute), levelWarning, "ahead of"},
		"clock, behind":        {clock(-2 * time.Minute), levelWarning, "behind"},
		"clock, very behind":   {clock(-20 * time.Minute), levelFailed, "behind"},
		"clock, refused for":   {with(judgeClock, func(f *storeFacts) { refused(f); f.contact.Asked = now.Add(time.Hour) }), levelFailed, "ahead of"},
		"clock, none":          {with(judgeClock, folder), levelSkipped, "no time"},
		"region":               {with(judgeRegion, same), levelOK, "eu-west-1"},
		"region, another":      {with(judgeRegion, func(f *storeFacts) { f.contact.Signed = "us-east-1" }), levelFailed, "?region=eu-west-1"},
		"region, not told":     {with(judgeRegion, folder), levelSkipped, ""},
		"format":               {with(judgeFormat, same), levelOK, "0001"},
		"format, none":         {with(judgeFormat, func(f *storeFacts) { f.format, f.id = wrap(snapshot.ErrNotStore), "" }), levelFailed, "lazyvol init"},
		"format, newer":        {with(judgeFormat, func(f *storeFacts) { f.format, f.id = errors.New("version 7"), "" }), levelFailed, "docs/upgrade.md"},
		"format, unread":       {with(judgeFormat, refused), levelSkipped, ""},
		"format, down":         {with(judgeFormat, down), levelSkipped, "does not answer"},
		"what refuses, unread": {base.with(refused).unusable(), levelSkipped, "refuses"},
		"what is bad, unread":  {base.with(badURL).unusable(), levelSkipped, "opened"},
	})
}

func (f storeFacts) with(change func(*storeFacts)) storeFacts {
	change(&f)
	return f
}

func TestDoctorJudgesWrites(t *testing.T) {
	refused := fmt.Errorf("put: %w", blockstore.ErrDenied)
	checkJudged(t, map[string]judged{
		"all":            {judgeWrites(writeFacts{}), levelOK, "honoured"},
		"careless":       {judgeWrites(writeFacts{probe: errors.New("ignores If-None-Match")}), levelFailed, "If-None-Match"},
		"read-only":      {judgeWrites(writeFacts{remove: refused, match: refused}), levelWarning, "mounted"},
		"delete only":    {judgeWrites(writeFacts{probe: refused}), levelWarning, "mounted"},
		"folder":         {judgeWrites(writeFacts{probe: unix.EACCES}), levelWarning, "mounted"},
		"append-only":    {judgeWrites(writeFacts{remove: refused, match: blockstore.ErrChanged}), levelOK, "not delete"},
		"careless again": {judgeWrites(writeFacts{remove: refused}), levelFailed, "If-Match"},
		"down":           {judgeWrites(writeFacts{remove: blockstore.ErrUnavailable}), levelFailed, "unavailable"},
		"down later":     {judgeWrites(writeFacts{probe: blockstore.ErrUnavailable}), levelFailed, "try again"},
		"too late":       {judgeWrites(writeFacts{probe: context.DeadlineExceeded}), levelFailed, "try again"},
		"strange match":  {judgeWrites(writeFacts{remove: refused, match: errors.New("501")}), levelFailed, "501"},
	})
}

func TestDoctorJudgesBucketsAndKeys(t *testing.T) {
	old := blockstore.Lifecycle{ExpiresOld: true}
	harm := blockstore.Lifecycle{Harms: []string{`rule "tidy" deletes objects after 30 days`}}
	asked := errors.New("501 from a server that cannot tell")
	checkJudged(t, map[string]judged{
		"plain":             {judgeVersions(bucketFacts{}), levelOK, "no old versions"},
		"versioned":         {judgeVersions(bucketFacts{versioned: true}), levelWarning, "never expire"},
		"versions expire":   {judgeVersions(bucketFacts{versioned: true, lifecycle: old}), levelOK, "expire"},
		"perhaps":           {judgeVersions(bucketFacts{versioned: true, lifecycleErr: asked}), levelWarning, "may not be asked"},
		"versions unknown":  {judgeVersions(bucketFacts{versions: asked}), levelSkipped, ""},
		"lifecycle":         {judgeLifecycle(bucketFacts{lifecycle: old}), levelOK, "no rule"},
		"harmful":           {judgeLifecycle(bucketFacts{lifecycle: harm}), levelFailed, "tidy"},
		"lifecycle unknown": {judgeLifecycle(bucketFacts{lifecycleErr: asked}), levelSkipped, ""},

		"config":     {judgeConfig("/etc/c.toml", nil), levelOK, "/etc/c.toml is valid"},
		"no config":  {judgeConfig("", nil), levelSkipped, ""},
		"bad config": {judgeConfig("", asked), levelFailed, "config check"},

		"key":             {judgeKey("file:///k", keyEnv, nil), levelOK, "file:///k"},
		"key, no URI":     {judgeKey("k", "/etc/c.toml:3", crypt.ErrKeyURI), levelFailed, "/etc/c.toml:3"},
		"key, none":       {judgeKey("file:///k", keyEnv, crypt.ErrKeyNotFound), levelFailed, "a copy of it"},
		"key, denied":     {judgeKey("file:///k", keyEnv, crypt.ErrKeyDenied), levelFailed, "chmod 600"},
		"key, disabled":   {judgeKey("file:///k", keyEnv, crypt.ErrKeyDisabled), levelFailed, "enable"},
		"key, no service": {judgeKey("awskms:///k", keyEnv, crypt.ErrKeyUnavailable), levelFailed, "endpoint"},
		"key, damaged":    {judgeKey("file:///k", keyEnv, crypt.ErrKeyFormat), levelFailed, "encryption.md"},
	})
}
