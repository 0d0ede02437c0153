// s3db.js 21.6.2 wants recker 1.0.103, which the npm registry does not have everywhere. The S3 path needs none of what
// came after 1.0.56 (the benchmark does without its HTTP handler, too); imports by that name still have to resolve.
export * from "recker-as-published";

export function createRedDbClient() {
  throw new Error("createRedDbClient is not in this stand-in for recker: the benchmark only uses S3.");
}
